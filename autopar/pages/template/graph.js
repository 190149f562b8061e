// The graph: a list of stages, each a list of boxes, with the messages to the next stage. Styles lay it out; Panzoom moves it.

const boxButtons = [];

function makeBox(number) {
  const box = data.graph.boxes[number];
  const { exchanges } = box;
  const lines = [
    make("span", { class: "name" }, ...breakable(box.name)),
    ...(box.kind === "nothing" ? ["not split"] : []).concat(box.lines).map((line) => make("span", {}, line)),
    ...exchanges.slice(0, 2).map((text) => make("span", { class: "exchange" }, `⇄ ${text}`)),
    exchanges.length > 2 ? make("span", { class: "exchange" }, `and ${exchanges.length - 2} more exchanges`) : null,
  ];
  const button = make("button", {
    type: "button", class: "box panzoom-exclude", "data-kind": box.kind, "data-box": String(number), "aria-pressed": "false",
  }, ...lines);
  button.addEventListener("click", (event) => {
    const heading = showBox(number);
    if (event.detail === 0) heading.focus(); // chosen by the keyboard
  });
  boxButtons[number] = button;
  return make("li", {}, button);
}

function makeStage(stage) {
  const several = data.graph.stages.length > 1;
  const heading = several ? `Stage ${stage.number}` : "Model";
  const lines = several ? stage.lines : [wordRanks(stage.ranks)];
  const numbers = [
    stage.staticBytes === null ? "" : `${formatBytes(stage.staticBytes)} always`,
    stage.savedBytes === null ? "" : `${formatBytes(stage.savedBytes)} per micro-batch`,
  ].filter((text) => text !== "").join(", ");
  const messages = stage.messages.map(([what, times, bytes], index) => make("li", {},
    `${index === 0 ? "→" : "←"} ${what}`, make("br"), `${times} ${bytes}`.replaceAll(" ", "\u00a0")));
  return make("li", { class: "stage" },
    make("div", { class: "stage-box" }, make("h3", {}, heading), ...lines.map((line) => make("p", { class: "note" }, line)), make("p", { class: "note" }, numbers),
      make("ol", {}, ...stage.boxes.map(makeBox))),
    messages.length > 0 ? make("ul", { class: "messages", "aria-label": "Messages with the next stage" }, ...messages)
      : make("span", { class: "then", "aria-hidden": "true" }, "→"));
}

function markChosen(number) {
  boxButtons.forEach((button, index) => button.setAttribute("aria-pressed", String(index === number)));
}

function showLegend() {
  byId("legend").append(...data.graph.kinds.map((kind) => make("li", { "data-kind": kind }, kind)));
}

/** Everything that can be searched for: [text in lower case, what to show, the box, the op or null]. */
function listTargets() {
  const boxOf = {};
  data.graph.boxes.forEach((box, number) => { boxOf[box.group] ??= number; });
  const blocks = data.graph.boxes.flatMap((box, number) => [box.name, ...(box.blocks.length > 1 ? box.blocks : [])].map((name) => [name, name, number, null]));
  const tensors = Object.entries(data.graph.tensors).flatMap(([group, rows]) => rows.map(([name]) => [name, `tensor ${name}`, boxOf[group], null]));
  const ops = data.ops.map((op, number) => [`${op.op} ${op.target} ${op.path} ${op.source}`, `op ${op.op}, ${op.target}`, boxOf[op.group], number]);
  return [...blocks, ...tensors, ...ops].filter(([, , box]) => box !== undefined).map(([text, ...rest]) => [text.toLowerCase(), ...rest]);
}

const MOST_FOUND = 30;

function search(targets, text) {
  const wanted = text.trim().toLowerCase();
  const found = wanted === "" ? [] : targets.filter(([target]) => target.includes(wanted));
  const boxes = new Set(found.map(([, , box]) => box));
  boxButtons.forEach((button, number) => {
    button.classList.toggle("found", boxes.has(number));
    button.classList.toggle("faded", wanted !== "" && !boxes.has(number));
  });
  byId("found-count").textContent = wanted === "" ? "" : `${formatCount(found.length)} found`;
  byId("found").replaceChildren(...found.slice(0, MOST_FOUND).map(([, shown, box, op]) => make("li", {}, make("button", {
    type: "button",
    class: "link",
    onclick: () => {
      boxButtons[box].scrollIntoView({ block: "nearest" });
      (op === null ? showBox(box) : showOp(op, box)).focus({ preventScroll: true });
    },
  }, shown))));
}

/** Arrow keys go from box to box. */
function moveByKey(event) {
  const number = boxButtons.indexOf(document.activeElement);
  const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
  if (number < 0 || step === undefined) return;
  event.preventDefault();
  boxButtons[Math.min(Math.max(number + step, 0), boxButtons.length - 1)].focus();
}

function showGraph() {
  byId("stages").append(...data.graph.stages.map(makeStage));
  showLegend();
  const targets = listTargets();
  byId("search").addEventListener("input", () => search(targets, byId("search").value));
  byId("stages").addEventListener("keydown", moveByKey);
  const seconds = data.graph.boxes.map((box) => box.seconds ?? 0);
  if (seconds.length > 0) showBox(seconds.indexOf(Math.max(...seconds))); // what takes longest is looked at first
  const zoom = Panzoom(byId("stages"), { canvas: true, cursor: "grab", maxScale: 4, minScale: 0.2, overflow: "auto", origin: "0 0", touchAction: "pan-y" });
  byId("graph-in").addEventListener("click", () => zoom.zoomIn({ animate: false }));
  byId("graph-out").addEventListener("click", () => zoom.zoomOut({ animate: false }));
  byId("graph-reset").addEventListener("click", () => zoom.reset({ animate: false }));
  byId("viewport").addEventListener("wheel", (event) => {
    if (event.ctrlKey || event.metaKey) zoom.zoomWithWheel(event); // without a key the wheel scrolls the page
  }, { passive: false });
}
