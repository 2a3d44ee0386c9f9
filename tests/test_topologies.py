"""Programs compiled for topologies: the counted collectives and memory, tested on CPU devices."""

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from benchmarks import topologies
from benchmarks.collectives import Exchange, exchanged
from posenc_jax.training.step import abstract_model

# HLO text as the TPU compiler writes it: a loop that counts to 8 by 2, with permutes and a sum split over two fusions.
TEXT = """\
HloModule jit_f

%part.1 (p.1: f32[4,8]) -> f32[4,8] {
  %p.1 = f32[4,8]{1,0:T(8,128)} parameter(0)
  ROOT %all-reduce.1 = f32[4,8]{1,0:T(8,128)S(1)} all-reduce(%p.1), channel_id=7, to_apply=%add
}

%part.2 (p.5: f32[4,8]) -> f32[4,8] {
  %p.5 = f32[4,8]{1,0:T(8,128)} parameter(0)
  ROOT %all-reduce.2 = f32[4,8]{1,0:T(8,128)S(1)} all-reduce(%p.5), channel_id=7, to_apply=%add
}

%body (p.2: (s32[], f32[4,8])) -> (s32[], f32[4,8]) {
  %p.2 = (s32[]{:T(128)}, f32[4,8]{1,0:T(8,128)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%p.2), index=0
  %x = f32[4,8]{1,0:T(8,128)} get-tuple-element(%p.2), index=1
  %two = s32[]{:T(128)} constant(2)
  %next = s32[]{:T(128)} add(%i, %two)
  %fusion.1 = f32[4,8]{1,0:T(8,128)} fusion(%x), kind=kOutput, calls=%part.1
  %fusion.2 = f32[4,8]{1,0:T(8,128)} fusion(%fusion.1), kind=kOutput, calls=%part.2
  %start = (f32[4,8]{1,0:T(8,128)}, f32[4,8]{1,0:T(8,128)}) collective-permute-start(%fusion.2), channel_id=8
  %done = f32[4,8]{1,0:T(8,128)} collective-permute-done(%start)
  %copied = s32[]{:T(128)} copy(%next)
  ROOT %tuple = (s32[]{:T(128)}, f32[4,8]{1,0:T(8,128)}) tuple(%copied, /*index=1*/%done)
}

%condition (p.3: (s32[], f32[4,8])) -> pred[] {
  %eight = s32[]{:T(128)} constant(8)
  %p.3 = (s32[]{:T(128)}, f32[4,8]{1,0:T(8,128)}) parameter(0)
  %count = s32[]{:T(128)} get-tuple-element(%p.3), index=0
  ROOT %less = pred[]{:T(512)} compare(%count, %eight), direction=LT
}

ENTRY %main (p.4: (s32[], f32[4,8]), y: bf16[16]) -> bf16[128] {
  %p.4 = (s32[]{:T(128)}, f32[4,8]{1,0:T(8,128)}) parameter(0)
  %y = bf16[16]{0:T(256)} parameter(1)
  %while.1 = (s32[]{:T(128)}, f32[4,8]{1,0:T(8,128)}) while(%p.4), condition=%condition, body=%body
  ROOT %all-gather.1 = bf16[128]{0:T(256)} all-gather(%y), channel_id=9, dimensions={0}
}
"""


def test_collectives_in_a_loop_count_as_often_as_it_goes_round():
    assert exchanged(TEXT) == {
        "all-reduce": Exchange(4, 4 * 128),
        "collective-permute": Exchange(4, 4 * 128),
        "all-gather": Exchange(1, 256),
    }


def test_collectives_of_a_program_compiled_here():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))

    def summed(x):
        return lax.scan(lambda total, _: (jnp.tanh(lax.psum(total, "data")), None), x, length=3)[0]

    rows = PartitionSpec("data")
    mapped = jax.shard_map(summed, mesh=mesh, in_specs=rows, out_specs=rows, check_vma=False)
    x = jax.ShapeDtypeStruct((8, 50), jnp.float32, sharding=NamedSharding(mesh, rows))
    assert exchanged(jax.jit(mapped).lower(x).compile().as_text()) == {"all-reduce": Exchange(3, 3 * 200)}


def test_devices_that_divide_the_batch_add_up_their_gradients_once():
    (data,) = topologies.rows(topologies.ON_CPU[:1])
    assert (data["mesh"], data["devices"], data["fits"], data["all-gather"]) == ("data=8", 8, "yes", "")
    config = topologies.config_of(topologies.ON_CPU[0])
    embedding = 256 * 64  # used in the output layer too: each use has a gradient
    mib = 4 * (abstract_model(config)[1] + embedding) / 2**20
    assert float(data["all-reduce"].split()[0]) == pytest.approx(mib, rel=1e-3)


def test_without_libtpu_the_command_says_what_to_install(monkeypatch, capsys):
    def missing(*arguments, **options):
        raise RuntimeError("JAX TPU support not installed")

    monkeypatch.setattr(topologies.topologies, "get_topology_desc", missing)
    with pytest.raises(SystemExit) as ended:
        list(topologies.rows(topologies.CASES[:1]))
    assert ended.value.code == 2
    assert 'pip install "jax[tpu]' in capsys.readouterr().err


def test_rows_of_cases_measured_before_are_replaced(tmp_path):
    path = tmp_path / "table.csv"
    row = {"topology": "v5e-1", "size": "small", "program": "training", "mesh": "data=1", "fits": "no"}
    for rows in ([row, row | {"size": "base"}], [row | {"fits": "yes"}]):
        assert list(topologies.written(path, iter(rows))) == rows
    assert path.read_text().splitlines()[1:] == ["v5e-1,small,training,data=1,yes", "v5e-1,base,training,data=1,no"]
