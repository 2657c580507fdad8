"""Random lives of a window, for property tests."""

from hypothesis import strategies as st

from rolling_kv.config import ALL_FRAMES


@st.composite
def histories(draw):
    """(window, sink, chunk sizes), where every chunk fits beside the sink."""
    chunks = draw(st.lists(st.integers(1, 5), min_size=1, max_size=14))
    sink = draw(st.integers(0, 4))
    window = draw(st.one_of(st.just(ALL_FRAMES), st.integers(sink + max(chunks), sink + max(chunks) + 8)))
    return window, sink, chunks
