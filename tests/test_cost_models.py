"""Cost models: closed forms written as formulas, known limits, profiles and the messages of bad ones."""

import dataclasses
import math
import pickle
from pathlib import Path

import pytest

from autopar.cost_models import (
    KINDS,
    Cluster,
    Link,
    axis_link,
    collective_seconds,
    find_machine,
    known_machines,
    load_machine,
    op_seconds,
    read_machine,
)
from autopar.errors import HardwareError

A, P = 1e-5, 1e9
LINK = Link(name="wire", latency_seconds=A, bandwidth_bytes_per_s=P)
H100 = find_machine("h100").device


@pytest.mark.parametrize("ranks", [2, 3, 8, 512])
@pytest.mark.parametrize("nbytes", [0, 1_000, 10**9])
def test_collectives_follow_their_closed_forms(ranks: int, nbytes: int) -> None:
    ring = 2 * (ranks - 1) * A + 2 * (ranks - 1) / ranks * nbytes / P
    tree = 2 * math.ceil(math.log2(ranks)) * A + 2 * nbytes / P
    gather = (ranks - 1) * A + (ranks - 1) / ranks * nbytes / P
    expected = {
        "all_reduce": min(ring, tree),
        "all_gather": gather,
        "reduce_scatter": gather,
        "all_to_all": (ranks - 1) * A + (ranks - 1) / ranks**2 * nbytes / P,
        "broadcast": (ranks - 1) * A + nbytes / P,
        "p2p": A + nbytes / P,
        "ring": gather,
        "halo": A + nbytes / ranks / P,
    }
    assert set(expected) == set(KINDS)
    for kind, seconds in expected.items():
        assert collective_seconds(kind, nbytes, ranks, LINK) == pytest.approx(seconds, rel=1e-12), kind


def test_all_reduce_takes_the_tree_only_where_latency_rules() -> None:
    assert collective_seconds("all_reduce", 8, 512, LINK) == pytest.approx(2 * 9 * A, rel=1e-3)
    assert collective_seconds("all_reduce", 10**12, 8, LINK) == pytest.approx(2 * 7 / 8 * 1000, rel=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_limits_of_collectives(kind: str) -> None:
    assert collective_seconds(kind, 10**9, 1, LINK) == 0.0
    times = [collective_seconds(kind, nbytes, 8, LINK) for nbytes in (0, 1, 10**3, 10**6, 10**9)]
    assert times == sorted(times)
    assert times[0] > 0
    with pytest.raises(HardwareError, match="-1 bytes"):
        collective_seconds(kind, -1, 8, LINK)
    with pytest.raises(HardwareError, match="over 0 ranks"):
        collective_seconds(kind, 1, 0, LINK)


def test_unknown_collective_lists_the_known_ones() -> None:
    with pytest.raises(HardwareError, match=r"'allreduce'; known: all_reduce, all_gather"):
        collective_seconds("allreduce", 1, 2, LINK)


def test_matmul_is_a_roofline_with_a_fixed_price() -> None:
    flops, peak = 1e12, 989e12
    compute = (flops + H100.matmul_half_flops) / (H100.matmul_efficiency * peak) + H100.launch_seconds
    assert op_seconds(H100, flops=flops, nbytes=1, dtype="torch.bfloat16", family="matmul") == pytest.approx(compute, rel=1e-12)
    half = H100.matmul_half_flops
    rate = half / (op_seconds(H100, flops=half, nbytes=0, dtype="bfloat16", family="matmul") - H100.launch_seconds)
    assert rate == pytest.approx(H100.matmul_efficiency * peak / 2, rel=1e-12)


@pytest.mark.parametrize("family", ["matmul", "attention", "pointwise", "reduction"])
def test_limits_of_ops(family: str) -> None:
    def cost(flops: float, nbytes: float) -> float:
        return op_seconds(H100, flops=flops, nbytes=nbytes, dtype="bfloat16", family=family)

    by_flops = [cost(flops, 1e6) for flops in (0, 1, 1e6, 1e9, 1e12, 1e15)]
    by_bytes = [cost(1e9, nbytes) for nbytes in (0, 1, 1e6, 1e9, 1e12)]
    assert by_flops == sorted(by_flops)
    assert by_bytes == sorted(by_bytes)
    assert cost(0, 0) == H100.launch_seconds
    memory = 1e12 / (H100.mem_bandwidth_bytes_per_s * H100.mem_efficiency)
    assert by_bytes[-1] == pytest.approx(memory + H100.launch_seconds, rel=1e-12)


def test_views_are_free_and_integers_move_as_bytes() -> None:
    assert op_seconds(H100, flops=0, nbytes=1e9, dtype="float32", family="view") == 0.0
    assert op_seconds(H100, flops=0, nbytes=1e9, dtype="int64", family="index") > H100.launch_seconds
    with pytest.raises(HardwareError, match=r"H100.*no peak_flops for int64, only for bfloat16"):
        op_seconds(H100, flops=1e9, nbytes=1, dtype="int64", family="matmul")
    with pytest.raises(HardwareError, match="-1 flops"):
        op_seconds(H100, flops=-1, nbytes=1, dtype="float32", family="pointwise")


@pytest.mark.parametrize("name", known_machines())
def test_every_profile_loads_and_makes_sense(name: str) -> None:
    machine = find_machine(name)
    assert machine.name == name
    assert machine.sources
    assert machine.device.usable_bytes > 1e9
    assert {"float32", "float64"} <= set(machine.device.peak_flops)
    assert machine.intra.rank_bytes_per_s >= machine.inter.rank_bytes_per_s
    assert read_machine(dataclasses.asdict(machine), name) == machine
    assert pickle.loads(pickle.dumps(machine)) == machine
    assert hash(machine) == hash(find_machine(name))
    for alias in machine.aliases:
        assert find_machine(alias.upper()) == machine


def test_profiles_share_no_name() -> None:
    words = [word for name in known_machines() for word in (name, *find_machine(name).aliases)]
    assert len(words) == len(set(words))
    assert {"a100-80gb", "h100", "cpu"} <= set(known_machines())


@pytest.mark.parametrize(
    ("text", "nodes", "per_node", "name"),
    [
        ("4x8xH100", 4, 8, "h100"),
        ("8xH100", 1, 8, "h100"),
        ("H100", 1, 1, "h100"),
        (" 2X8xa100 ", 2, 8, "a100-80gb"),
        ("2xcpu", 1, 2, "cpu"),
        ("2048x8xh100", 2048, 8, "h100"),
    ],
)
def test_parse(text: str, nodes: int, per_node: int, name: str) -> None:
    cluster = Cluster.parse(text)
    assert (cluster.nodes, cluster.devices_per_node, cluster.machine.name) == (nodes, per_node, name)
    assert cluster.world_size == nodes * per_node
    assert Cluster.parse(str(cluster)) == cluster


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("4x8xH10", r"'H10'.*Did you mean h100.*Known: a100-40gb.*4x8x\./my\.toml"),
        ("8xquantum", r"'quantum'\. Known: "),
        ("0x8xH100", r"nodes = 0 is not a whole number from 1"),
        ("16xH100", r"16 devices per node.*holds 8.*2x8xh100"),
        ("2x3x4xH100", r"2x3x4xH100.*no cluster.*4x8xH100"),
        ("4x8x", r"no cluster|no machine"),
        ("", r"no cluster"),
        ("2x8x./nowhere.toml", r"nowhere\.toml can't be read"),
    ],
)
def test_parse_refuses_with_a_remedy(text: str, message: str) -> None:
    with pytest.raises(HardwareError, match=message):
        Cluster.parse(text)


def test_with_memory() -> None:
    cluster = Cluster.parse("8xH100").with_memory(40_000_000_000)
    assert cluster.machine.device.memory_bytes == 40_000_000_000
    assert cluster.machine.device.usable_bytes == 40_000_000_000 - H100.reserved_bytes
    assert cluster.machine.device.peak_flops == H100.peak_flops
    with pytest.raises(HardwareError, match="nothing is left"):
        cluster.with_memory(10**9)
    with pytest.raises(HardwareError, match="memory_bytes = -1"):
        cluster.with_memory(-1)


def write_profile(folder: Path, *changes: tuple[str, str]) -> Path:
    """The H100 profile with lines replaced, in `folder`."""
    text = (Path(__file__).parent.parent / "cost_models/machines/h100.toml").read_text()
    for old, new in changes:
        assert old in text
        text = text.replace(old, new)
    path = folder / "mine.toml"
    path.write_text(text)
    return path


def test_profile_from_a_path(tmp_path: Path) -> None:
    path = write_profile(tmp_path, ('name = "h100"', 'name = "mine"'), ("devices_per_node = 8", "devices_per_node = 4"))
    cluster = Cluster.parse(f"2x4x{path}")
    assert (cluster.machine.name, cluster.world_size) == ("mine", 8)
    assert cluster.machine == load_machine(path)


def test_bad_profile_lists_every_offender(tmp_path: Path) -> None:
    path = write_profile(
        tmp_path,
        ("devices_per_node = 8", "devices_per_node = true"),
        ("launch_seconds = 3e-6", "launch_secs = 3e-6"),
        ("overlap = 0.8", "overlap = 1.8"),
        ("memory_bytes = 84_900_000_000", "memory_bytes = 84.9e9"),
        ("mem_bandwidth_bytes_per_s = 3.35e12", "mem_bandwidth_bytes_per_s = -1"),
        ("float32 = 67e12", 'float32 = "fast"'),
        ("[inter]", "[outer]"),
    )
    with pytest.raises(HardwareError) as caught:
        load_machine(path)
    message = str(caught.value)
    for part in (
        str(path),
        "devices_per_node = True is not a whole number from 1 to 1048576",
        "device.launch_seconds is missing",
        "device.launch_secs is unknown (did you mean launch_seconds?)",
        "device.overlap = 1.8 is not a fraction from 0 to 1",
        "device.memory_bytes = 84900000000.0 is not a whole number from 1",
        "device.mem_bandwidth_bytes_per_s = -1 is not a rate from 1e3 to 1e18 bytes per second",
        "device.peak_flops.float32 = 'fast' is not a rate from 1e6 to 1e21 FLOP/s",
        "inter is missing",
        "outer is unknown (did you mean inter?)",
    ):
        assert part in message


@pytest.mark.parametrize("value", ["nan", "inf", "0.0", "-0.5"])
def test_profile_refuses_numbers_that_are_none(tmp_path: Path, value: str) -> None:
    with pytest.raises(HardwareError, match="matmul_efficiency"):
        load_machine(write_profile(tmp_path, ("matmul_efficiency = 0.801", f"matmul_efficiency = {value}")))


def test_profile_that_is_no_toml(tmp_path: Path) -> None:
    with pytest.raises(HardwareError, match=r"mine\.toml is no TOML"):
        load_machine(write_profile(tmp_path, ("[device]", "[device")))
    with pytest.raises(HardwareError, match="intra = 3 is not a table"):
        read_machine(dataclasses.asdict(find_machine("h100")) | {"intra": 3}, "mine")


def fewest_on_a_node(cluster: Cluster, sizes: tuple[int, ...], axis: int) -> int:
    """Brute force: over all groups of the axis, the fewest ranks that a group has on one of its nodes."""
    stride, size = math.prod(sizes[axis + 1 :]), sizes[axis]
    groups: dict[tuple[int, int], dict[int, int]] = {}
    for rank in range(math.prod(sizes)):
        nodes = groups.setdefault((rank // (stride * size), rank % stride), {})
        node = rank // cluster.devices_per_node
        nodes[node] = nodes.get(node, 0) + 1
    return min(min(nodes.values()) for nodes in groups.values())


@pytest.mark.parametrize("sizes", [(4, 8), (32,), (2, 16), (8, 4), (2, 2, 8), (16, 2), (4, 2, 4), (2, 4, 4), (5, 6), (6, 5), (2, 3, 5)])
def test_axis_link_against_brute_force(sizes: tuple[int, ...]) -> None:
    cluster = Cluster.parse("4x8xH100")
    intra, inter = cluster.machine.intra, cluster.machine.inter
    for axis, size in enumerate(sizes):
        local = fewest_on_a_node(cluster, sizes, axis)
        link = axis_link(cluster, sizes, axis)
        if local == size:
            assert link == intra
        else:
            assert link.local_ranks == local
            ring = min(local * inter.rank_bytes_per_s, intra.rank_bytes_per_s)
            assert link.ring_bytes_per_s == pytest.approx(ring, rel=1e-12)
            assert link.rank_bytes_per_s == inter.rank_bytes_per_s
            hops = [inter.latency_seconds] + [intra.latency_seconds] * (local - 1)
            assert link.latency_seconds == pytest.approx(sum(hops) / local, rel=1e-12)


def test_axis_link_by_example() -> None:
    cluster = Cluster.parse("4x8xH100")
    tensor, data = axis_link(cluster, (4, 8), 1), axis_link(cluster, (4, 8), 0)
    assert tensor.name == "NVLink 4"
    assert (data.name, data.ring_ports, data.local_ranks) == ("InfiniBand NDR", 1.0, 1)
    assert axis_link(cluster, (32,), 0).ring_bytes_per_s == pytest.approx(8 * 50e9 * 0.9)
    assert cluster.link_of(8) == cluster.machine.intra
    assert cluster.link_of(2, stride=8).local_ranks == 1
    with pytest.raises(HardwareError, match="mesh of 8x8 = 64 ranks is larger than 4x8xh100"):
        axis_link(cluster, (8, 8), 0)


def test_all_to_all_keeps_local_parts_off_the_network() -> None:
    cluster = Cluster.parse("2x8xH100")
    link = axis_link(cluster, (16,), 0)
    seconds = collective_seconds("all_to_all", 10**9, 16, link)
    sent_over_the_card = 10**9 / 16 * 8 / 16
    assert seconds == pytest.approx(15 * link.latency_seconds + sent_over_the_card / (50e9 * 0.9), rel=1e-12)
