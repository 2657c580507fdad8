"""What each speed of passes costs in error: on the recorded cases, and in what the bundled model's videos show."""
