"""The text that a model generates at each validation: that of the command, in the folder of each run."""

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from posenc_jax.evaluation.generator import Generator
from posenc_jax.schema import ConfigError
from tests.runs.run_helpers import config_of, launch
from tests.runs.test_stack import assert_close
from tests.runs.tiny_runs import alone, program_of, stacked, tiny

ASKED = {"logging__sample_prompt": "ab\n", "logging__sample_tokens": 5}


def test_each_run_of_a_stack_logs_its_text_and_trains_as_without(tmp_path, capsys):
    changes = {"model__dropout": 0.1, "model__tied_embeddings": False}
    configs = [tiny("learned", seed=seed, **changes, **ASKED) for seed in (0, 3)]
    runs = stacked(configs, tmp_path)
    lines = capsys.readouterr().out.splitlines()
    shown, program = [], program_of(configs[0])
    for i, (config, (state, _)) in enumerate(zip(configs, runs, strict=True)):
        arrays, tokenizer = (state["params"], state["constants"]), program.data.dataset.tokenizer
        own = Generator(config, program.graphdefs[False], *arrays, tokenizer)
        steps = own.generate([own.encode("ab\n", "--prompt")], 5)
        text = "ab\n" + b"".join(own.bytes_of(token) for ((_, token),) in steps).decode(errors="replace")
        logged = EventAccumulator(str(tmp_path / str(i) / "tensorboard")).Reload().Tensors("validation/sample")
        assert [event.step for event in logged] == [4, 7]
        shown.append(logged[-1].tensor_proto.string_val[0].decode())
        assert f"step 7  {i}  sample {text!r}" in lines
    assert shown[0].startswith("    ab\n    ")
    assert shown[0] != shown[1]
    assert_close(runs[:1], [alone(tiny("learned", **changes), tmp_path / "alone")])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"logging__sample_tokens": 14}, "config.logging.sample_tokens = 14: must be at most 13 after a prompt of 3"),
        ({"logging__sample_prompt": "a" * 16}, "config.logging.sample_prompt = '16 tokens': must have fewer than 16"),
    ],
)
def test_a_text_that_the_model_cannot_read_is_refused_before_the_run(changes, message, folder, tmp_path):
    with pytest.raises(ConfigError, match=message):
        launch(config_of(folder, "learned", **ASKED | changes), tmp_path / "run")
    assert not (tmp_path / "run").exists()
