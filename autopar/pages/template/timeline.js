// The timeline and the memory over time: two uPlot charts that share their time axis.

// What the colours stand for; each has a variable of the style sheet, --time-NAME.
const PHASES = {
  forward: "forward", "input-gradients": "input gradients", "weight-gradients": "weight gradients", recompute: "run again",
  optimizer: "optimizer", communication: "exposed communication", copies: "copies", hidden: "communication behind computing",
  messages: "messages to other ranks",
};

const KIND_FIELDS = ["thread", "phase", "purpose", "stage", "layer", "axis", "collective", "nbytes", "seconds"];

function phaseOf(kind) {
  if (kind.thread.startsWith("messages")) return "messages";
  if (kind.thread === "communication behind computing") return "hidden";
  if (kind.thread !== "compute") return kind.thread;
  if (kind.purpose === "recompute" || kind.purpose === "optimizer") return kind.purpose;
  return kind.phase === "forward" ? "forward" : kind.phase === "weight gradient" ? "weight-gradients" : "input-gradients";
}

/** The events of the page as objects, per rank in the order of their starts. */
function readEvents(timeline) {
  const kinds = timeline.kinds.map((values) => Object.fromEntries(values.map((value, index) => [KIND_FIELDS[index], value])));
  for (const kind of kinds) {
    kind.colour = phaseOf(kind);
    kind.isBeside = kind.colour === "hidden" || kind.colour === "messages"; // runs beside what the rank does
  }
  const ranks = timeline.ranks.map(() => []);
  const columns = timeline.events;
  columns.start.forEach((start, index) => {
    const kind = kinds[columns.kind[index]];
    const rank = columns.rank[index];
    ranks[rank].push({ rank, kind, start, end: start + kind.seconds, name: timeline.names[columns.name[index]], microbatch: columns.microbatch[index] });
  });
  return ranks;
}

function wordEvent(event, timeline) {
  const { kind } = event;
  const parts = [
    timeline.ranks[event.rank], event.name, kind.purpose, kind.phase,
    kind.stage === null ? "" : `stage ${kind.stage}`,
    event.microbatch < 0 ? "" : `micro-batch ${event.microbatch}`,
    kind.layer === event.name ? "" : kind.layer,
    kind.nbytes > 0 ? formatBytes(kind.nbytes) : "",
    `${formatSeconds(kind.seconds)}, from ${formatSeconds(event.start)} to ${formatSeconds(event.end)}`,
  ];
  return [...new Set(parts.filter((part) => part !== ""))].join(" · ");
}

/** The position of the last of `count` ascending values that isn't above `wanted`; -1 where all are. */
function findLast(count, valueAt, wanted) {
  let low = 0;
  let high = count;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (valueAt(middle) <= wanted) low = middle + 1;
    else high = middle;
  }
  return low - 1;
}

function colourOf(name) {
  return getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();
}

/** Times with as many digits as the distance of the ticks needs. */
function wordTimes(chart, splits, axis, space, step) {
  const [unit, name] = [[1, "s"], [1e-3, "ms"], [1e-6, "µs"], [1e-9, "ns"]].find(([size]) => chart.scales.x.max >= size) ?? [1e-9, "ns"];
  const digits = Math.min(Math.max(0, Math.ceil(-Math.log10(step / unit) - 1e-9)), 9);
  return splits.map((value) => `${(value / unit).toFixed(digits)} ${name}`);
}

function timeAxis() {
  return { stroke: () => colourOf("text"), grid: { stroke: () => colourOf("line"), width: 1 }, ticks: { stroke: () => colourOf("line") }, values: wordTimes, space: 90 };
}

const SIDE = 84; // pixels left of both charts, so that their times are below each other

class Lanes {
  /** The timeline: a lane per rank, above what the rank does one after the other, below what runs beside it. */
  constructor(timeline) {
    this.timeline = timeline;
    this.events = readEvents(timeline);
    this.chosen = null;
    const count = timeline.ranks.length;
    const height = Math.round(Math.min(Math.max(560 / count, 18), 56)) * count + 50;
    const axis = {
      scale: "y", size: SIDE, stroke: () => colourOf("text"), grid: { show: false }, ticks: { show: false },
      splits: () => timeline.ranks.map((_, rank) => rank + 0.5).filter((_, rank) => count <= 32 || rank % Math.ceil(count / 32) === 0),
      values: (chart, splits) => splits.map((value) => (count === 1 ? "all ranks" : `pp rank ${Math.floor(value)}`)),
    };
    this.chart = new uPlot({
      width: byId("lanes").clientWidth, height, legend: { show: false },
      padding: [8, 16, 0, 0],
      scales: { x: { time: false, range: (chart, low, high) => [low, high] }, y: { dir: -1, range: [0, count] } },
      series: [{}, { scale: "y", paths: () => null, points: { show: false } }],
      axes: [timeAxis(), axis],
      cursor: { sync: { key: "step", scales: ["x", null] }, y: false, points: { show: false }, drag: { x: true, y: false } },
      hooks: { draw: [() => this.draw()], setCursor: [() => this.hover()] },
    }, [[0, timeline.until], [0, 0]], byId("lanes"));
  }

  /** Top and bottom of an event's bar, in lanes. */
  rowOf(event) {
    return event.kind.isBeside ? [event.rank + 0.7, event.rank + 0.94] : [event.rank + 0.06, event.rank + 0.66];
  }

  draw() {
    const { chart } = this;
    const { ctx } = chart;
    const { min, max } = chart.scales.x;
    const fills = Object.fromEntries(Object.keys(PHASES).map((name) => [name, colourOf(`time-${name}`)]));
    ctx.save();
    ctx.beginPath();
    ctx.rect(chart.bbox.left, chart.bbox.top, chart.bbox.width, chart.bbox.height);
    ctx.clip();
    ctx.font = `${Math.round(11 * uPlot.pxRatio)}px system-ui, sans-serif`;
    ctx.textBaseline = "middle";
    ctx.textAlign = "left";
    for (const events of this.events) for (const event of events) {
      if (event.start < max && event.end > min) this.drawEvent(ctx, event, fills[event.kind.colour], event === this.chosen);
    }
    ctx.restore();
  }

  drawEvent(ctx, event, fill, isChosen) {
    const { chart } = this;
    const left = chart.valToPos(event.start, "x", true);
    const width = chart.valToPos(event.end, "x", true) - left;
    const [top, bottom] = this.rowOf(event).map((row) => chart.valToPos(row, "y", true));
    ctx.fillStyle = fill;
    ctx.fillRect(left, top, Math.max(width - (width > 4 ? 1 : 0), 0.6), bottom - top);
    if (isChosen) {
      ctx.strokeStyle = colourOf("text");
      ctx.lineWidth = 3 * uPlot.pxRatio;
      ctx.strokeRect(left, top, Math.max(width, 2), bottom - top);
    }
    if (width > 24 && bottom - top > 12 && ctx.measureText(event.name).width + 6 < width) {
      ctx.fillStyle = "#000"; // all colours of the timeline are light
      ctx.fillText(event.name, left + 3, (top + bottom) / 2);
    }
  }

  /** The event at a place of the chart, or null. */
  find(left, top) {
    const time = this.chart.posToVal(left, "x");
    const lane = this.chart.posToVal(top, "y");
    const events = this.events[Math.floor(lane)];
    if (events === undefined) return null;
    const isBeside = lane % 1 > 0.68;
    const slack = this.chart.posToVal(2, "x") - this.chart.posToVal(0, "x"); // thin events can be hit too
    let index = findLast(events.length, (position) => events[position].start, time + slack);
    for (let steps = 0; index >= 0 && steps < 64; index -= 1, steps += 1) {
      const event = events[index];
      if (event.kind.isBeside === isBeside && event.end + slack >= time) return event;
    }
    return null;
  }

  hover() {
    const { left, top } = this.chart.cursor;
    if (left === undefined || left < 0 || top < 0) return;
    const event = this.find(left, top);
    byId("event").textContent = event === null ? "" : wordEvent(event, this.timeline);
  }

  choose(event) {
    this.chosen = event;
    byId("event").textContent = wordEvent(event, this.timeline);
    const { min, max } = this.chart.scales.x;
    if (event.end < min || event.start > max) this.onMove((event.start + event.end) / 2 - (max - min) / 2, max - min);
    this.chart.redraw(false);
  }

  /** Go to another event: `step` events on, on the rank `lane` lanes below. */
  go(step, lane) {
    const from = this.chosen ?? this.events.flat()[0];
    if (from === undefined) return;
    const rank = Math.min(Math.max(from.rank + lane, 0), this.events.length - 1);
    const events = this.events[rank];
    if (events.length === 0) return;
    const index = this.chosen === null ? 0
      : lane === 0 ? events.indexOf(from) + step
        : Math.max(findLast(events.length, (position) => events[position].start, from.start), 0);
    this.choose(events[Math.min(Math.max(index, 0), events.length - 1)]);
  }
}

const LEAST_OF_BUDGET = 0.2; // of the device's memory; a step that uses less is shown without that line, or it would be flat

function peaksOf(timeline) {
  return timeline.memory.map((rank) => rank.bytes.reduce((most, nbytes) => Math.max(most, nbytes), 0));
}

/** Per rank the bytes at each of the times at which any rank's memory changes. */
function alignMemory(memory) {
  const times = [...new Set(memory.flatMap((rank) => rank.times))].sort((a, b) => a - b);
  const values = memory.map((rank) => {
    let index = -1;
    return times.map((time) => {
      while (index + 1 < rank.times.length && rank.times[index + 1] <= time) index += 1;
      return index < 0 ? null : rank.bytes[index];
    });
  });
  return [times, ...values];
}

function makeMemoryChart(timeline, state) {
  const stepped = uPlot.paths.stepped({ align: 1 });
  const series = timeline.ranks.map((_, rank) => ({
    stroke: () => colourOf(rank === state.rank ? "accent" : "faint"), width: 1.5, paths: stepped, points: { show: false },
  }));
  const aligned = alignMemory(timeline.memory);
  const peak = peaksOf(timeline).reduce((one, other) => Math.max(one, other), 0);
  const most = peak < LEAST_OF_BUDGET * data.budget ? peak : Math.max(data.budget, peak);
  return new uPlot({
    width: byId("memory-chart").clientWidth, height: 240, legend: { show: false },
    padding: [8, 16, 0, 0],
    scales: { x: { time: false, range: (chart, low, high) => [low, high] }, y: { range: [0, most * 1.05] } },
    series: [{}, ...series, { stroke: () => colourOf("text"), dash: [6, 4], width: 1, points: { show: false } }],
    axes: [timeAxis(), {
      size: SIDE, stroke: () => colourOf("text"), grid: { stroke: () => colourOf("line"), width: 1 }, ticks: { show: false },
      values: (chart, splits) => splits.map(formatBytes),
    }],
    cursor: { sync: { key: "step", scales: ["x", null] }, y: false, points: { show: false }, drag: { x: true, y: false } },
    hooks: { setCursor: [(chart) => showMemory(chart, timeline, state)] },
  }, [...aligned, aligned[0].map(() => data.budget)], byId("memory-chart"));
}

/** Say how much memory the chosen rank holds at the cursor, or at its peak. */
function showMemory(chart, timeline, state) {
  const { times, bytes } = timeline.memory[state.rank];
  if (bytes.length === 0) return;
  const hasCursor = chart !== null && chart.cursor.left >= 0;
  const peak = bytes.indexOf(peaksOf(timeline)[state.rank]);
  const time = hasCursor ? chart.posToVal(chart.cursor.left, "x") : times[peak];
  const index = hasCursor ? Math.max(findLast(times.length, (position) => times[position], time), 0) : peak;
  const when = hasCursor ? `at ${formatSeconds(time)}` : `at its peak, at ${formatSeconds(time)}`;
  byId("memory-readout").textContent = `${timeline.ranks[state.rank]}: ${formatBytes(bytes[index])} ${when}. A device has ${formatBytes(data.budget)} (dashed).`;
}

/** The rank whose memory is fullest. */
function findFullest(timeline) {
  const peaks = peaksOf(timeline);
  return peaks.indexOf(Math.max(...peaks));
}

function showTimeline() {
  const { timeline } = data;
  if (timeline === null) {
    byId("timeline-note").textContent = "The plan says nothing of single blocks, so there is no timeline. Make it again with autopar plan.";
    for (const id of ["timeline-bar", "phases", "lanes", "memory-chart"]) byId(id).hidden = true;
    return;
  }
  const isCut = timeline.until < timeline.seconds;
  byId("timeline-note").textContent = "The step as the search simulated it. Drag to look at a part of it; a double click shows all."
    + (isCut ? ` Its first ${formatSeconds(timeline.until)} of ${formatSeconds(timeline.seconds)} are shown.` : "");
  const state = { rank: findFullest(timeline) };
  const lanes = new Lanes(timeline);
  const memory = makeMemoryChart(timeline, state);
  const charts = [lanes.chart, memory];
  const move = (start, length) => {
    const span = Math.min(length, timeline.until);
    const min = Math.min(Math.max(start, 0), timeline.until - span);
    for (const chart of charts) chart.setScale("x", { min, max: min + span });
  };
  lanes.onMove = move;
  const view = () => [lanes.chart.scales.x.min, lanes.chart.scales.x.max - lanes.chart.scales.x.min];
  const zoom = (factor) => {
    const [start, length] = view();
    move(start + (length - length * factor) / 2, length * factor);
  };
  const shift = (share) => {
    const [start, length] = view();
    move(start + share * length, length);
  };
  const all = () => move(0, timeline.until);
  all();
  const actions = { "time-in": () => zoom(0.5), "time-out": () => zoom(2), "time-earlier": () => shift(-0.25), "time-later": () => shift(0.25), "time-all": all };
  for (const [id, action] of Object.entries(actions)) byId(id).addEventListener("click", action);
  const keys = {
    ArrowRight: () => lanes.go(1, 0), ArrowLeft: () => lanes.go(-1, 0), ArrowDown: () => lanes.go(0, 1), ArrowUp: () => lanes.go(0, -1),
    "+": () => zoom(0.5), "-": () => zoom(2), 0: all,
  };
  byId("lanes").addEventListener("keydown", (event) => {
    if (keys[event.key] === undefined || event.ctrlKey || event.metaKey || event.altKey) return;
    event.preventDefault();
    keys[event.key]();
  });
  for (const chart of charts) chart.over.addEventListener("dblclick", all);
  lanes.chart.over.addEventListener("click", () => {
    const event = lanes.find(lanes.chart.cursor.left, lanes.chart.cursor.top);
    if (event !== null) lanes.choose(event);
  });
  byId("rank").append(...timeline.ranks.map((name, rank) => make("option", { value: String(rank), selected: rank === state.rank }, name)));
  byId("rank").addEventListener("change", () => {
    state.rank = Number(byId("rank").value);
    memory.redraw(false);
    showMemory(null, timeline, state);
  });
  showMemory(null, timeline, state);
  const used = new Set(lanes.events.flatMap((events) => events.map((event) => event.kind.colour)));
  byId("phases").append(...Object.entries(PHASES).filter(([name]) => used.has(name)).map(([name, text]) => make("li", { "data-phase": name }, text)));
  window.addEventListener("resize", () => charts.forEach((chart) => chart.setSize({ width: chart.root.parentElement.clientWidth, height: chart.height })));
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => charts.forEach((chart) => chart.redraw(false)));
}
