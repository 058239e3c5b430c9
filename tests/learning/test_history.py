import json

from modeling_fer.learning.history import History


def test_rows_are_kept_in_memory_and_in_the_file(tmp_path):
    path = tmp_path / "history.jsonl"
    history = History(path, 0, is_main=True)
    assert path.read_text() == "", "the file is there from the start"
    rows = [{"step": 1, "loss": 0.5}, {"step": 2, "round/marginal": [0.25, 0.75]}]
    for row in rows:
        history.add(row)
    assert history.rows == [json.loads(line) for line in path.read_text().splitlines()] == rows


def test_resuming_drops_what_came_after_the_checkpoint_and_a_line_cut_short(tmp_path):
    path = tmp_path / "history.jsonl"
    lines = [f'{{"step": {step}, "loss": 1.0}}\n' for step in (1, 2, 3, 3, 4)]
    path.write_text("".join(lines) + '{"step": 5, "lo')
    history = History(path, 3, is_main=True)
    assert [row["step"] for row in history.rows] == [1, 2, 3, 3]
    assert path.read_text() == "".join(lines[:4])
    history.add({"step": 4, "loss": 2.0})
    assert path.read_text() == "".join(lines[:4]) + '{"step": 4, "loss": 2.0}\n'


def test_a_fresh_start_forgets_the_rows_of_an_earlier_one(tmp_path):
    path = tmp_path / "history.jsonl"
    path.write_text('{"step": 1}\n')
    assert History(path, 0, is_main=True).rows == []
    assert path.read_text() == ""


def test_other_processes_write_nothing(tmp_path):
    path = tmp_path / "history.jsonl"
    history = History(path, 0, is_main=False)
    history.add({"step": 1})
    assert history.rows == []
    assert not path.exists()
