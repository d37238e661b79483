"""Reading a program's traffic: programs whose traffic is known, and notations of other backends."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxlm.dist import mesh as meshes
from jaxlm.dist.collectives import Collective, Total, collectives, totals, wire_bytes
from jaxlm.dist.mesh import MeshConfig

RING = [(i, (i + 1) % 4) for i in range(4)]

OPERATIONS = {
    # Operand float32 [4, 16] on each of 4 devices along `context`; bytes of the whole array.
    "all-gather": (lambda x: jax.lax.all_gather(x, "context", tiled=True).sum(0, keepdims=True) + x, 4 * 256),
    "all-reduce": (lambda x: jax.lax.psum(x, "context"), 256),
    "reduce-scatter": (lambda x: jnp.tile(jax.lax.psum_scatter(x, "context", tiled=True), (4, 1)), 256),
    "all-to-all": (lambda x: jax.lax.all_to_all(x, "context", 0, 0, tiled=True), 256),
    "collective-permute": (lambda x: jax.lax.ppermute(x, "context", RING), 256),
}


def compiled(function, *arguments):
    return jax.jit(function).lower(*arguments).compile().as_text()


@pytest.mark.parametrize("kind", OPERATIONS)
def test_calls_in_nested_loops_are_counted(kind):
    operation, size = OPERATIONS[kind]
    mesh = meshes.make(MeshConfig(data=2, context=4))

    def local(x):
        def inner(x, _):
            return jnp.tanh(operation(x)), None

        return jax.lax.scan(lambda x, _: (jax.lax.scan(inner, x, length=3)[0], None), x, length=5)[0]

    rows = P(("data", "context"))
    text = compiled(
        jax.shard_map(local, mesh=mesh, in_specs=rows, out_specs=rows, check_vma=False), jnp.zeros((32, 16))
    )
    assert totals(text) == {kind: Total(15, 15 * size)}
    assert all(c.group == 4 for c in collectives(text) if kind != "collective-permute")


def test_a_reduction_that_is_sliced_at_once_is_a_scatter():
    mesh = meshes.make(MeshConfig(fsdp=8))
    rows, cut = NamedSharding(mesh, P("fsdp", None)), NamedSharding(mesh, P("fsdp", None))
    x = jax.ShapeDtypeStruct((64, 16), jnp.float32, sharding=rows)
    product = jax.jit(lambda x: x.T @ x, out_shardings=cut).lower(x).compile().as_text()
    assert totals(product) == {"reduce-scatter": Total(1, 16 * 16 * 4)}
    whole = jax.jit(lambda x: x.T @ x, out_shardings=NamedSharding(mesh, P())).lower(x).compile().as_text()
    assert totals(whole) == {"all-reduce": Total(1, 16 * 16 * 4)}


def test_a_loop_of_unknown_length_is_refused():
    mesh = meshes.make(MeshConfig(data=8))

    def local(x, n):
        return jax.lax.while_loop(lambda c: c[0] < n, lambda c: (c[0] + 1, jax.lax.psum(c[1], "data")), (0, x))[1]

    spread = jax.shard_map(local, mesh=mesh, in_specs=(P("data"), P()), out_specs=P("data"), check_vma=False)
    text = compiled(spread, jnp.zeros((8, 4)), jnp.int32(3))
    assert [c.calls for c in collectives(text)] == [0]
    with pytest.raises(ValueError, match="in a loop of unknown length"):
        totals(text)


TEXT = """HloModule jit_f, num_partitions=8

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %add.1 = f32[] add(%a, %b)
}

%fused (p0: f32[8,4], p1: s32[]) -> f32[1,4] {
  %p0 = f32[8,4]{1,0} parameter(0)
  %p1 = s32[] parameter(1)
  %zero = s32[] constant(0)
  ROOT %slice = f32[1,4]{1,0} dynamic-slice(%p0, %p1, %zero), dynamic_slice_sizes={1,4}
}

ENTRY %main (x: f32[8,4], i: s32[]) -> f32[1,4] {
  %x = f32[8,4]{1,0:T(8,128)} parameter(0)
  %i = s32[] parameter(1)
  %sum = (f32[8,4]{1,0}, /*index=1*/f32[]) all-reduce(%x, %x), replica_groups=[2,4]<=[8], to_apply=%add
  %first = f32[8,4]{1,0} get-tuple-element(%sum), index=0
  %second = f32[] get-tuple-element(%sum), index=1
  %half = bf16[8,4]{1,0} all-reduce(%x), replica_groups={{0,1},{2,3}}, to_apply=%add.clone_promoted
  %begin = (bf16[2,4]{1,0}, bf16[8,4]{1,0}) all-gather-start(%x), replica_groups=[1,8]<=[8], dimensions={0}
  %end = bf16[8,4]{1,0} all-gather-done(%begin)
  %scatter = f32[1,4]{1,0} reduce-scatter(%x), replica_groups=mesh['a'=4,'b'=2] {'a','b'}, to_apply=%add
  %part = f32[2,4]{1,0} all-to-all(%x), replica_groups=mesh['a'=8], device_ids=([2,4]T(1,0)) {'a':(2)4}
  ROOT %out = f32[1,4]{1,0} fusion(%first, %i), kind=kLoop, calls=%fused
}
"""


def test_notations():
    found = {(c.name, c.kind): c for c in collectives(TEXT)}
    assert found == {
        (c.name, c.kind): c
        for c in [
            Collective("reduce-scatter", "sum", 128, 1, 4),
            Collective("all-reduce", "sum", 4, 1, 4),
            Collective("all-reduce", "half", 32, 1, 2),
            Collective("all-gather", "begin", 64, 1, 8),
            Collective("reduce-scatter", "scatter", 128, 1, 8),
            Collective("all-to-all", "part", 32, 1, 4),
        ]
    }
    expected = 128 * 3 / 4 + 2 * 4 * 3 / 4 + 2 * 32 / 2 + 64 * 7 / 8 + 128 * 7 / 8 + 32 * 3 / 4
    assert wire_bytes(found.values()) == expected
