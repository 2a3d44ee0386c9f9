"""The attention benchmark runs on a CPU with interpreted kernels, and detects a wrong algorithm."""

import pytest

from benchmarks import attention


@pytest.mark.parametrize("name", ["t5", "fox"])
def test_all_algorithms_agree(name, capsys):
    assert attention.main([name, "--lengths", "32", "--checked", "21", "--tokens", "32"]) == 0
    lines = capsys.readouterr().out.splitlines()
    rows = [line.split("\t") for line in lines[2:-1]]
    algorithms = "dense", "blockwise", "kernel", "tpu_kernel"
    assert [row[:2] for row in rows] == [[name, algorithm] for algorithm in algorithms]
    assert all(float(cell) >= 0 for row in rows for cell in row[2:])
    assert lines[-1] == "all agree with dense attention"


def test_a_wrong_algorithm_is_named(monkeypatch, capsys):
    def wrong(*arguments):
        return attention.dense(*arguments) * 1.01

    monkeypatch.setattr(attention, "blockwise", wrong)
    assert attention.main(["none", "--lengths", "32", "--checked", "21", "--tokens", "32"]) == 1
    assert capsys.readouterr().out.splitlines()[-1] == "wrong: none with blockwise"
