"""Event files, read with TensorBoard's own reader."""

import io
import re

import numpy as np
import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar import layout_pb2
from tensorboard.plugins.hparams import metadata

from posenc_jax.reporting.figures import extrapolation_curve
from posenc_jax.reporting.tensorboard import TensorBoard, extrapolation_by_rule, extrapolation_curves
from posenc_jax.schema import flat
from tests.reporting.rows import BITS, LENGTHS, learned_results, results, row


def read(logdir):
    return EventAccumulator(str(logdir), size_guidance={"images": 0, "scalars": 0}).Reload()


def points(logdir, tag):
    return [(event.step, event.value) for event in read(logdir).Scalars(tag)]


def test_scalars_come_back(tmp_path):
    with TensorBoard(tmp_path / "new" / "run") as board:
        board.scalars(1, {"train/loss": 2.5, "train/bits_per_byte": 3.5})
        board.scalars(2, {"train/loss": 2.25})
    assert points(tmp_path / "new" / "run", "train/loss") == [(1, 2.5), (2, 2.25)]
    assert points(tmp_path / "new" / "run", "train/bits_per_byte") == [(1, 3.5)]


def test_one_number_for_each_layer_is_one_curve_for_each(tmp_path):
    with TensorBoard(tmp_path) as board:
        board.scalars(3, {"attention/entropy": [2.5, 1.5], "loss": 1.0})
    assert read(tmp_path).Tags()["scalars"] == ["attention/entropy/layer_0", "attention/entropy/layer_1", "loss"]
    assert points(tmp_path, "attention/entropy/layer_1") == [(3, 1.5)]


def test_what_is_flushed_is_on_disk(tmp_path):
    board = TensorBoard(tmp_path)
    for step in range(50):
        board.scalars(step, {"loss": 1.0})
    board.flush()
    assert len(points(tmp_path, "loss")) == 50
    board.close()


def test_tags_are_made_of_the_characters_tensorboard_takes(tmp_path):
    with TensorBoard(tmp_path) as board:
        board.scalars(1, {"/train/loss @ 2é[a]:b-c.d_e": 1.0})
    assert read(tmp_path).Tags()["scalars"] == ["train/loss___2__a__b-c.d_e"]


def test_a_resumed_run_hides_the_points_after_the_step_it_resumes_from(tmp_path):
    """Both writers are opened within one second."""
    with TensorBoard(tmp_path) as board:
        for step in range(1, 6):
            board.scalars(step, {"loss": float(step)})
    with TensorBoard(tmp_path, purge_step=4) as board:
        board.scalars(4, {"loss": 40.0})
    assert points(tmp_path, "loss") == [(1, 1.0), (2, 2.0), (3, 3.0), (4, 40.0)]


def test_settings_and_final_metrics_are_one_row_of_the_hparams_tab(tmp_path):
    settings = {"seed": 3, "model": {"qk_norm": True, "dtype": "float32"}, "lengths": (1, 2), "bias": None}
    with TensorBoard(tmp_path) as board:
        board.hparams(flat(settings), {"final/bits": 1.5})
    assert not [path for path in tmp_path.iterdir() if path.is_dir()]
    contents = read(tmp_path).summary_metadata
    session = metadata.parse_session_start_info_plugin_data(
        contents[metadata.SESSION_START_INFO_TAG].plugin_data.content
    )
    shown = {name: getattr(value, value.WhichOneof("kind")) for name, value in session.hparams.items()}
    assert shown == {
        "seed": 3.0,
        "model.qk_norm": True,
        "model.dtype": "float32",
        "lengths": "(1, 2)",
        "bias": "None",
    }
    experiment = metadata.parse_experiment_plugin_data(contents[metadata.EXPERIMENT_TAG].plugin_data.content)
    assert [info.name.tag for info in experiment.metric_infos] == ["final/bits"]
    assert points(tmp_path, "final/bits") == [(0, 1.5)]
    assert metadata.SESSION_END_INFO_TAG in contents


def test_a_text_comes_back(tmp_path):
    with TensorBoard(tmp_path) as board:
        board.text("settings", "| seed | 0 |")
    (event,) = read(tmp_path).Tensors("settings")
    assert event.tensor_proto.string_val[0].decode() == "| seed | 0 |"
    assert read(tmp_path).summary_metadata["settings"].plugin_data.plugin_name == "text"


def test_a_plain_text_is_shown_as_it_is_at_its_step(tmp_path):
    with TensorBoard(tmp_path) as board:
        board.plain_text("validation/sample", "a *b*\n\n  <i>\x1b", 3)
    (event,) = read(tmp_path).Tensors("validation/sample")
    assert event.step == 3
    assert event.tensor_proto.string_val[0].decode() == "    a *b*\n    \n      <i>\\x1b"  # indented: a block of code


def test_a_figure_is_an_image_of_its_pixels(tmp_path):
    figure = extrapolation_curve(results())
    with TensorBoard(tmp_path) as board:
        board.figure("extrapolation", figure, 7)
    (event,) = read(tmp_path).Images("extrapolation")
    assert event.step == 7
    with Image.open(io.BytesIO(event.encoded_image_string)) as image:
        pixels = np.asarray(image.convert("RGB"))
    width, height = figure.canvas.get_width_height()
    assert pixels.shape == (height, width, 3)
    assert pixels[0, -1].tolist() == [255, 255, 255]
    assert pixels.min() == 0


def test_extrapolation_is_one_run_per_scaling_rule_over_length(tmp_path):
    extrapolation_by_rule(tmp_path, results())
    assert {path.name for path in tmp_path.iterdir() if path.is_dir()} == {f"scaling-{name}" for name in BITS}
    for name, bits in BITS.items():
        curve = points(tmp_path / f"scaling-{name}", "windows/prefix_bits_per_byte")
        assert [step for step, _ in curve] == list(LENGTHS)
        assert [value for _, value in curve] == pytest.approx(bits)
        assert "windows/by_position_bits_per_byte" not in read(tmp_path / f"scaling-{name}").Tags()["scalars"]


def test_extrapolation_written_again_replaces_the_first(tmp_path):
    extrapolation_by_rule(tmp_path, results())
    extrapolation_by_rule(tmp_path, results()[::-1])
    curve = points(tmp_path / "scaling-ntk", "windows/prefix_bits_per_byte")
    assert [step for step, _ in curve] == list(LENGTHS)[::-1]
    assert len(list((tmp_path / "scaling-ntk").iterdir())) == 1


def test_settings_written_again_replace_the_first(tmp_path):
    """This happens if the report of an extended or killed run is made again. TensorBoard itself keeps the first."""
    for duration, bits in (("60 steps", 1.5), ("80 steps", 1.25)):
        with TensorBoard(tmp_path, purge_step=0) as board:
            board.hparams({"duration": duration}, {"final/bits": bits})
    content = read(tmp_path).summary_metadata[metadata.SESSION_START_INFO_TAG].plugin_data.content
    session = metadata.parse_session_start_info_plugin_data(content)
    assert session.hparams["duration"].string_value == "80 steps"
    assert points(tmp_path, "final/bits") == [(0, 1.25)]


def test_intervals_are_written_beside_the_curve(tmp_path):
    extrapolation_curves(tmp_path, [row(length=512, value=2.0, half_width=0.5)])
    assert points(tmp_path, "windows/prefix_bits_per_byte/low") == [(512, 1.5)]
    assert points(tmp_path, "windows/prefix_bits_per_byte/high") == [(512, 2.5)]


def test_charts_name_the_tags_of_the_curves(tmp_path):
    with TensorBoard(tmp_path) as board:
        board.extrapolation_charts(["prefix_bits_per_byte", "copy_gain_bits_per_byte"])
    (event,) = read(tmp_path).Tensors("custom_scalars__config__")
    layout = layout_pb2.Layout.FromString(event.tensor_proto.string_val[0])
    lines, intervals = layout.category
    assert [chart.title for chart in lines.chart] == [
        "Bits per byte over the whole window",
        "Text found again, bits per byte",
    ]
    (pattern,) = lines.chart[0].multiline.tag
    extrapolation_curves(tmp_path / "rope", [row()])
    written = read(tmp_path / "rope").Tags()["scalars"]
    assert [tag for tag in written if re.search(pattern, tag)] == ["windows/prefix_bits_per_byte"]
    (series,) = intervals.chart[0].margin.series
    assert {series.value, series.lower, series.upper} == set(written)


def test_lengths_without_a_value_are_left_out(tmp_path):
    extrapolation_by_rule(tmp_path, [row for row in learned_results() if row.encoding == "learned"])
    curve = points(tmp_path / "windows", "windows/prefix_bits_per_byte")
    assert [step for step, _ in curve] == [128, 256, 512]


def test_a_scaling_rule_with_settings_names_one_folder(tmp_path):
    extrapolation_by_rule(tmp_path, [row(), row(scaling="../yarn:a/b=2")])
    folders = {path.name for path in tmp_path.iterdir() if path.is_dir()}
    assert folders == {"scaling-none", "scaling-.._yarn_a_b_2"}
