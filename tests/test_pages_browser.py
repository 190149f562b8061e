"""A page in a browser: it opens without complaints and requests, and its parts answer to pointer and keyboard."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from autopar.capture.export import capture
from autopar.cost_models import Cluster
from autopar.pages.page import make_page
from autopar.plans import Plan
from autopar.report import describe_decisions, find_rates
from autopar.report.summary import format_rate
from autopar.timelines import predict
from autopar.units import format_bytes, format_seconds, format_share
from tests.browser import Browser, start_browser
from tests.planning import make_plan as search
from tests.test_pages import make_hostile_plan, plan_of

SCHEMES = ("light", "dark")
LARGEST_BYTES = 5_000_000
LONGEST_SECONDS = 2.0


class Block(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = torch.nn.LayerNorm(64), torch.nn.Linear(64, 256), torch.nn.Linear(256, 64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(self.up(self.norm(x)).relu())


class Stack(torch.nn.Module):
    def __init__(self, layers: int) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList(Block() for _ in range(layers))
        self.head = torch.nn.Linear(64, 1)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return (self.head(x) - y).square().mean()


def plan_stack(layers: int, ranks: int, pins: dict[str, object]) -> Plan:
    captured = capture(Stack(layers), (torch.randn(64, 64), torch.randn(64, 1)))
    return search(captured.graph, Cluster.parse(f"{ranks}xcpu"), pins=pins)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with start_browser() as started:
        yield started


def write(plan: Plan, folder: Path) -> Path:
    path = folder / "plan.html"
    path.write_text(make_page(plan), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def pipelined(browser: Browser, tmp_path_factory: pytest.TempPathFactory) -> tuple[Plan, Path]:
    return plan_of("pp"), write(plan_of("pp"), tmp_path_factory.mktemp("page"))


@pytest.fixture
def opened(browser: Browser, pipelined: tuple[Plan, Path]) -> Plan:
    browser.open(pipelined[1])
    return pipelined[0]


def rows_of(browser: Browser, table: str) -> list[list[str]]:
    script = "return [...document.querySelectorAll(arguments[0])].map((row) => [...row.cells].map((cell) => cell.textContent))"
    return [list(row) for row in browser.run(script, f"{table} tbody tr")]


def wait_for_first(browser: Browser, text: str) -> None:
    """Wait until the first row of the table of communication has this exposed time."""
    wait_until(browser, f"return document.querySelector('#table-traffic tbody td:nth-child(6)').textContent === '{text}'")


def wait_until(browser: Browser, script: str) -> None:
    """Wait until a script returns something true."""
    end = time.monotonic() + 5
    while not browser.run(script):
        assert time.monotonic() < end, f"in vain: {script}"
        time.sleep(0.01)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_page_opens_without_complaints_and_requests(browser: Browser, pipelined: tuple[Plan, Path], scheme: str) -> None:
    browser.open(pipelined[1], scheme)
    for details in browser.all("#tables details:not([open]) summary"):
        details.click()
    for box in browser.all(".box"):
        box.click()
    assert browser.complaints() == []
    assert browser.requests() == [pipelined[1].as_uri()]


def test_the_two_schemes_differ_and_can_be_read(browser: Browser, opened: Plan) -> None:
    """Contrast of texts is 4.5 and more, of what marks a box, an event or the focus 3 and more (WCAG 2.2)."""
    script = """
      const style = getComputedStyle(document.documentElement);
      const canvas = document.createElement("canvas").getContext("2d");
      const luminance = (name) => {
        canvas.fillStyle = style.getPropertyValue(name).trim();
        const [r, g, b] = [1, 3, 5].map((at) => parseInt(canvas.fillStyle.slice(at, at + 2), 16) / 255)
          .map((value) => (value <= 0.04045 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4));
        return 0.2126 * r + 0.7152 * g + 0.0722 * b;
      };
      const contrast = (one, other) => {
        const [low, high] = [luminance(one), luminance(other)].sort((a, b) => a - b);
        return (high + 0.05) / (low + 0.05);
      };
      const names = [...document.styleSheets[0].cssRules].flatMap((rule) => (rule.selectorText === ":root" ? [...rule.style] : []));
      const texts = ["--text", "--soft", "--accent"].flatMap((name) => ["--back", "--raised"].map((back) => contrast(name, back)));
      const marks = names.filter((name) => /^--(kind|focus|found|edge)/.test(name)).map((name) => contrast(name, "--back"));
      const events = names.filter((name) => name.startsWith("--time")).map((name) => (luminance(name) + 0.05) / 0.05);
      return [Math.min(...texts), Math.min(...marks), Math.min(...events), style.getPropertyValue("--back").trim(),
        getComputedStyle(document.body).backgroundColor];
    """
    backs = []
    for scheme in SCHEMES:
        browser.set_scheme(scheme)
        texts, marks, events, _, back = browser.run(script)
        assert texts >= 4.5
        assert marks >= 3
        assert events >= 4.5  # black names on the bars
        backs.append(back)
    assert backs[0] != backs[1]


def test_numbers_are_written_as_in_python(browser: Browser, opened: Plan) -> None:
    generator = random.Random(0)
    seconds = [0.0, 1e-10, 0.1, 100.5, 0.125e-3, 9.995, 99.95, 0.9995, *(10 ** generator.uniform(-10, 4) for _ in range(500))]
    nbytes = [0, 17, 999, 1000, 1005, 1015, 100_500, 999_500, *(round(10 ** generator.uniform(0, 16)) for _ in range(500))]
    nbytes += [0.5, 2.5, 16.7, 999.5, *(10 ** generator.uniform(0, 6) for _ in range(100))]  # of a mean rank
    rates = [0.5, 2.0, 50.0, 99.96, 100.5, 101.5, *(10 ** generator.uniform(-4, 9) for _ in range(200))]
    shares = [0.0, 0.0005, 0.0015, 0.125, 1.0, *(generator.random() for _ in range(200))]
    found = browser.run(
        "const [seconds, bytes, shares, rates] = arguments; return [seconds.map(formatSeconds), bytes.map(formatBytes),"
        " shares.map((value) => format(value, 'share')), rates.map((value) => format(value, 'rate'))]",
        seconds,
        nbytes,
        shares,
        rates,
    )
    assert found[:2] == [list(map(format_seconds, seconds)), list(map(format_bytes, nbytes))]
    assert found[2:] == [[format_share(share, 1.0) for share in shares], list(map(format_rate, rates))]


def test_the_header_says_step_and_memory(browser: Browser, opened: Plan) -> None:
    figures = {entry.text.split("\n")[0]: entry.text.split("\n")[1] for entry in browser.all("#figures div")}
    assert figures["step, predicted"] == format_seconds(opened.seconds.step)
    assert figures["memory per device"] == format_bytes(opened.memory.total)
    assert figures["bubble"] == format_seconds(opened.seconds.bubble)
    rates = find_rates(opened)
    assert rates is not None
    assert rates.tokens is not None
    assert rates.utilisation is not None
    assert figures["tokens per second"] == f"{rates.tokens:,.0f}"
    assert figures["model-flops utilisation"] == format_share(rates.utilisation, 1.0)
    lead = [element.text for element in browser.all("#lead dd")]
    assert lead[1:-1] == [text for _, text in describe_decisions(opened)]
    assert browser.text("h1") == f"{opened.model} on {opened.cluster}"


def test_tables_sort_by_numbers_and_by_texts(browser: Browser, opened: Plan) -> None:
    before = rows_of(browser, "#table-traffic")
    exposed = [traffic.seconds for traffic in opened.traffic]
    browser.get("#table-traffic th:nth-child(6) button").click()  # largest first
    wait_until(browser, "return document.querySelector('#table-traffic th:nth-child(6)').getAttribute('aria-sort') === 'descending'")
    wait_for_first(browser, format_seconds(max(exposed)))
    assert [row[5] for row in rows_of(browser, "#table-traffic")] == [format_seconds(value) for value in sorted(exposed, reverse=True)]
    total = browser.text("#table-traffic tfoot tr")
    browser.get("#table-traffic th:nth-child(6) button").send_keys("\ue007")  # Enter
    wait_for_first(browser, format_seconds(min(exposed)))
    assert [row[5] for row in rows_of(browser, "#table-traffic")] == [format_seconds(value) for value in sorted(exposed)]
    assert browser.text("#table-traffic tfoot tr") == total
    browser.get("#table-traffic th:nth-child(2) button").click()
    wait_until(browser, "return document.querySelectorAll('#table-traffic [aria-sort]').length === 1")
    wait_until(browser, "return document.querySelector('#table-traffic th:nth-child(2)').hasAttribute('aria-sort')")
    time.sleep(0.05)
    names = [row[1] for row in rows_of(browser, "#table-traffic")]
    assert names == sorted(names, reverse=True)
    assert sorted(before) == sorted(rows_of(browser, "#table-traffic"))


def test_at_first_the_longest_box_is_shown_with_all_columns(browser: Browser, opened: Plan) -> None:
    boxes = browser.run("return data.graph.boxes")
    longest = max(boxes, key=lambda box: float(box["seconds"]))
    assert browser.text("#details h3") == longest["name"]
    cut = "return [...document.querySelectorAll('#details .scroll')].filter((each) => each.scrollWidth > each.clientWidth + 1).length"
    for box in browser.all(".box"):
        box.click()
        assert browser.run(cut) == 0


def test_a_box_shows_its_costs_and_tensors(browser: Browser, opened: Plan) -> None:
    graph = browser.run("return data.graph")
    number = next(number for number, box in enumerate(graph["boxes"]) if len(box["blocks"]) > 1)
    box = graph["boxes"][number]
    browser.get(f'.box[data-box="{number}"]').click()
    assert browser.text("#details h3") == box["name"]
    assert browser.get(f'.box[data-box="{number}"]').get_attribute("aria-pressed") == "true"
    details = browser.text("#details")
    assert format_seconds(sum(row[6] for row in box["rows"])) in details
    for axis, what in box["axes"].items():
        assert f"{axis} splits {what}" in details
    assert len(rows_of(browser, "#details")) >= len(box["rows"]) + len(graph["tensors"][box["group"]])
    assert [item.get_attribute("textContent") for item in browser.all("#details .names li")] == box["blocks"]


def test_an_op_shows_its_loops_costs_and_source(browser: Browser, opened: Plan) -> None:
    op = max(opened.ops, key=lambda op: op.flops)
    graph = browser.run("return data.graph")
    number = next(number for number, box in enumerate(graph["boxes"]) if box["group"] == op.group)
    browser.get(f'.box[data-box="{number}"]').click()
    next(button for button in browser.all("#details td button") if button.text == op.op).click()
    assert browser.text("#details h3") == op.op
    details = browser.text("#details")
    assert op.source
    assert op.source in details
    assert ", ".join(f"{loop} {size:,}" for loop, size in op.loops.items()) in details
    assert format_seconds(op.seconds.step) in details
    assert format_seconds(op.seconds.forward) in details
    for axis, what in op.splits.items():
        assert f"{axis} splits {what}" in details
    browser.get("#details p button").click()
    assert browser.text("#details h3") == graph["boxes"][number]["name"]
    browser.get("#search").send_keys(op.source)
    assert any(button.text.startswith(f"op {op.op},") for button in browser.all("#found button"))


def test_search_finds_layers_and_tensors(browser: Browser, opened: Plan) -> None:
    last = opened.pipeline.blocks[-2].name
    browser.get("#search").send_keys(last)
    found = browser.all("#found button")
    assert last in [button.text for button in found]
    marked = browser.all(".box.found")
    assert 1 <= len(marked) < len(browser.all(".box"))
    next(button for button in found if button.text == last).click()
    assert last in [item.get_attribute("textContent") for item in browser.all("#details .names li")]
    tensor = next(name for group in opened.groups for name in group.tensors.values())
    browser.get("#search").clear()
    browser.get("#search").send_keys(tensor)
    assert f"tensor {tensor}" in [button.text for button in browser.all("#found button")]
    browser.get("#search").clear()
    browser.get("#search").send_keys("no such layer")
    assert browser.text("#found-count") == "0 found"
    assert len(browser.all(".box.faded")) == len(browser.all(".box"))


def test_the_graph_zooms(browser: Browser, opened: Plan) -> None:
    width = browser.get(".box").rect["width"]
    browser.get("#graph-in").click()
    wait_until(browser, f"return document.querySelector('.box').getBoundingClientRect().width > {width} + 5")
    browser.get("#graph-reset").click()
    wait_until(browser, f"return Math.abs(document.querySelector('.box').getBoundingClientRect().width - {width}) < 1")


def test_boxes_are_reached_and_chosen_by_keys(browser: Browser, opened: Plan) -> None:
    browser.run("document.querySelector('.box').focus()")
    browser.press("\ue014")  # right
    assert browser.run("return document.activeElement.dataset.box") == "1"
    browser.press("\ue007")
    assert browser.run("return document.activeElement.parentElement.id") == "details"  # the heading of the details
    assert browser.text("#details h3") == browser.run("return data.graph.boxes[1].name")


def test_every_control_is_reached_by_the_tab_key_with_a_visible_focus(browser: Browser, opened: Plan) -> None:
    browser.run("document.activeElement.blur(); window.scrollTo(0, 0)")
    reached: set[str] = set()
    for _ in range(300):
        browser.press("\ue004")
        name, outline = browser.run(
            "const at = document.activeElement; return [at.id || at.className || at.tagName, getComputedStyle(at).outlineStyle]"
        )
        if name == "BODY":  # after the last control
            break
        assert outline != "none", name
        reached.add(browser.run("return document.activeElement.closest('th')?.textContent ?? arguments[0]", name))
    assert {"search", "graph-in", "graph-reset", "time-in", "time-all", "rank", "lanes"} <= reached
    assert any("box" in name.split() for name in reached)
    assert {"exposed", "part"} <= reached  # headings of tables


def test_pointing_at_the_timeline_names_the_event(browser: Browser, opened: Plan) -> None:
    over = browser.get("#lanes .u-over")
    trace = predict(opened)
    event = max((event for event in trace.events if event.rank == 1 and event.thread == "compute"), key=lambda event: event.seconds)
    browser.run("arguments[0].scrollIntoView({block: 'center'})", over)
    browser.point_at(over, (event.start + event.end) / 2 / trace.seconds, (1 + 0.3) / len(trace.ranks))
    words = browser.text("#event").split(" · ")
    assert words[:2] == [trace.ranks[1], event.name]
    assert f"stage {event.stage}" in words
    assert f"micro-batch {event.microbatch}" in words
    assert words[-1] == f"{format_seconds(event.seconds)}, from {format_seconds(event.start)} to {format_seconds(event.end)}"


def test_the_timeline_answers_to_keys(browser: Browser, opened: Plan) -> None:
    trace = predict(opened)
    browser.run("document.getElementById('lanes').focus()")
    browser.press("\ue014", "\ue014")
    first, second = sorted((event for event in trace.events if event.rank == 0), key=lambda event: event.start)[:2]
    assert f"from {format_seconds(second.start)} to" in browser.text("#event")
    browser.press("\ue012")  # left
    assert f"to {format_seconds(first.end)}" in browser.text("#event")
    browser.press("\ue015")  # down
    assert browser.text("#event").startswith(trace.ranks[1])
    browser.press("+", "+")
    wait_until(browser, "return document.querySelector('#lanes .u-axis') !== null")
    browser.press("0")
    assert browser.complaints() == []


def test_memory_of_every_rank_is_said(browser: Browser, opened: Plan) -> None:
    trace = predict(opened)
    peaks = [max(sample.nbytes for sample in trace.memory if sample.rank == rank) for rank in range(len(trace.ranks))]
    fullest = peaks.index(max(peaks))
    assert f"{trace.ranks[fullest]}: {format_bytes(opened.memory.total)} at its peak" in browser.text("#memory-readout")
    for rank, name in enumerate(trace.ranks):
        browser.all("#rank option")[rank].click()
        assert browser.text("#memory-readout").startswith(f"{name}: {format_bytes(peaks[rank])} at its peak")


def test_hostile_names_are_only_text(browser: Browser, tmp_path: Path) -> None:
    path = write(make_hostile_plan(), tmp_path)
    browser.open(path)
    for box in browser.all(".box"):
        box.click()
    assert browser.complaints() == []
    assert browser.requests() == [path.as_uri()]
    assert browser.run("return document.scripts.length") == 3
    assert browser.text("#notes li") == make_hostile_plan().notes[0]


@pytest.mark.parametrize("layers", [2, 32])
def test_small_models_have_a_page(browser: Browser, tmp_path: Path, layers: int) -> None:
    browser.open(write(plan_stack(layers, 4, {"dp": 2, "tp": 2}), tmp_path))
    assert len(browser.all(".box")) <= 4
    assert browser.complaints() == []


def test_a_page_of_126_layers_on_16_stages_is_small_and_opens_at_once(browser: Browser, tmp_path: Path) -> None:
    plan = plan_stack(126, 16, {"pp": 16, "microbatches": 64, "schedule": "1f1b"})
    path = write(plan, tmp_path)
    assert path.stat().st_size < LARGEST_BYTES
    seconds = []
    for _ in range(3):  # the fastest of three, since other tests run beside
        browser.open(path)
        seconds.append(browser.run("return performance.getEntriesByType('navigation')[0].loadEventEnd / 1000"))
    assert 0 < min(seconds) < LONGEST_SECONDS
    assert len(browser.all(".stage")) == 16
    assert browser.complaints() == []
    browser.get("#search").send_keys("layers.57")
    assert browser.text("#found-count") == "1 found"
    width = browser.run("return document.documentElement.scrollWidth - document.documentElement.clientWidth")
    assert width == 0  # nothing reaches beyond the window
