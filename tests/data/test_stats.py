from emor3_jax.data.stats import RowStats


def test_counts_of_rows_left_out_go_on_after_resume() -> None:
    def opened() -> RowStats:
        stats = RowStats()
        stats.add("unknown_answer", "a")
        stats.begin_reading()
        return stats

    stats = opened()
    assert stats.found_in_reading() == {}
    assert stats.add("unreadable_image", "b") and not stats.add("unreadable_image", "b")
    stats.add_cut("c")
    found = stats.found_in_reading()
    assert found == {"unreadable_image": ["b"], "cut": ["c"]}
    resumed = opened()
    # Read ahead before the position was set back.
    resumed.add("unreadable_image", "z")
    resumed.restore(found)
    assert resumed.counts() == stats.counts() and resumed.questions_cut == 1
    assert not resumed.add("unreadable_image", "b") and resumed.found_in_reading() == found
