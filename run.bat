@echo off
rem Renders workflows\api\quickstart.json to output\quickstart.mp4, through ComfyUI where there is one, else through the
rem engine alone. Makes .venv on the first run. Options: run.bat --help
setlocal DisableDelayedExpansion
cd /d "%~dp0" || exit /b 1
set "LAUNCHER="
if defined PYTHON call :try "%PYTHON%"
call :try ".venv\Scripts\python.exe"
call :try py -3
call :try python
call :try python3
if defined COMFYUI_PATH call :try "%COMFYUI_PATH%\..\python_embeded\python.exe"
call :try "..\..\..\python_embeded\python.exe"
call :try "..\..\python_embeded\python.exe"
if not defined LAUNCHER goto none
%LAUNCHER% tools\launch.py run %*
exit /b %ERRORLEVEL%

:try
if defined LAUNCHER exit /b 0
%* -c "import sys; sys.exit(sys.version_info < (3, 7))" >nul 2>nul
if %ERRORLEVEL% equ 0 set LAUNCHER=%*
exit /b 0

:none
echo No Python 3 was found. Install Python 3.10 to 3.13 from python.org.
exit /b 1
