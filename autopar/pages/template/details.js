// What is shown of a box or an op that was chosen.

const ROW_COLUMNS = [["phase", ""], ["purpose", ""], ["axis", ""], ["collective", ""], ["times", "count"], ["bytes", "bytes"],
  ["exposed", "seconds"], ["hidden", "seconds"]];

/** The position of a column of the rows of costs. */
function rowColumn(name) {
  return ROW_COLUMNS.findIndex(([column]) => column === name);
}

function sum(rows, name) {
  return rows.reduce((total, row) => total + row[rowColumn(name)], 0);
}

function makeRows(name, title, rows) {
  const total = ["all", "", "", "", ...["times", "bytes", "exposed", "hidden"].map((column) => sum(rows, column))];
  return makeTable({ name, title, columns: ROW_COLUMNS, rows, total });
}

/** A list of terms; those without a text are left out. */
function makeTerms(terms) {
  return make("dl", {}, ...terms.filter(([, text]) => text !== "").flatMap(([term, text]) => [make("dt", {}, term), make("dd", {}, text)]));
}

function wordAxes(axes) {
  return Object.entries(axes).map(([axis, what]) => `${axis} splits ${what}`).join("; ") || "nothing";
}

function wordRanks([first, last]) {
  return first === last ? `rank ${first}` : `ranks ${first} to ${last}`;
}

function showDetails(title, ...parts) {
  const heading = make("h3", { tabindex: "-1" }, title);
  byId("details").replaceChildren(heading, ...parts);
  byId("details").scrollTop = 0;
  return heading;
}

/** Show a box: where it runs, what is split, what it costs, its tensors and ops. Returns the heading. */
function showBox(number) {
  const box = data.graph.boxes[number];
  const stage = data.graph.stages[box.stage];
  const several = box.blocks.length > 1 ? `, ${box.blocks.length} blocks together` : "";
  const parts = [makeTerms([
    ["stage", `${stage.number}, on pipeline rank ${stage.pipelineRank} (${wordRanks(stage.ranks)})`],
    ["split", wordAxes(box.axes)],
    ["run again in the backward", box.recompute],
    ["exposed time in a step", box.seconds === null ? "" : `${formatSeconds(box.seconds)}${several}`],
    ["parameters on a rank", box.parameterBytes === null ? "" : formatBytes(box.parameterBytes)],
    ["activations of a micro-batch on a rank", box.activationBytes === null ? "" : formatBytes(box.activationBytes)],
    ["layers like these", box.group],
  ])];
  if (box.rows.length > 0) parts.push(makeRows("box", "Costs of a step, on one rank", box.rows));
  const ops = opsOf(box.group);
  if (ops.length > 0) parts.push(makeOps(ops, number));
  const tensors = data.graph.tensors[box.group] ?? [];
  if (tensors.length > 0) {
    const columns = [["tensor", ""], ["layout", ""]];
    parts.push(makeTable({ name: "tensors", title: "Tensors of the first layer like these", columns, rows: tensors, total: [] }));
  }
  const names = make("ol", { class: "names" }, ...box.blocks.map((name) => make("li", {}, name)));
  parts.push(make("details", {}, make("summary", {}, `${formatCount(box.blocks.length)} block${box.blocks.length === 1 ? "" : "s"}`), names));
  markChosen(number);
  return showDetails(box.name, ...parts);
}

/** The numbers of the ops of a group of layers. */
function opsOf(group) {
  return data.ops.flatMap((op, number) => (op.group === group ? [number] : []));
}

function secondsOf(op) {
  return op.seconds.reduce((total, [, seconds]) => total + seconds, 0);
}

/** A table of ops, those first that take longest. */
function makeOps(group, box) {
  const numbers = [...group].sort((one, other) => secondsOf(data.ops[other]) - secondsOf(data.ops[one]));
  const ops = numbers.map((number) => data.ops[number]);
  const columns = [["op", ""], ["exposed", "seconds"], ["hidden", "seconds"], ["bytes", "bytes"], ["like ops", "count"], ["operator or tensor", ""]];
  const rows = ops.map((op) => [op.op, secondsOf(op), op.hidden, op.nbytes, op.count, op.target]);
  const total = ["all", ...[1, 2, 3].map((column) => rows.reduce((total, row) => total + row[column], 0)), null, ""];
  const title = "Ops of layers like these, of a step on the mean rank";
  return makeTable({ name: "ops", title, columns, rows, total }, (row) => showOp(numbers[row], box).focus());
}

/** Show an op: its loops, what splits them, its costs and the user's line. `box` is where to go back to. Returns the heading. */
function showOp(number, box) {
  const op = data.ops[number];
  const back = make("button", { type: "button", onclick: () => showBox(box).focus() }, `Back to ${data.graph.boxes[box].name}`);
  const terms = makeTerms([
    ["operator or tensor", op.target],
    ["module", op.path],
    ["source", op.source],
    ["loops", Object.entries(op.loops).map(([loop, size]) => `${loop} ${formatCount(size)}`).join(", ")],
    ["rule", op.space],
    ["split", wordAxes(op.splits)],
    ["like ops", formatCount(op.count)],
    ["flops of the forward, all ranks", op.flops > 0 ? op.flops.toExponential(2) : ""],
    ["bytes of its communication", formatBytes(op.nbytes)],
    ["hidden communication", formatSeconds(op.hidden)],
  ]);
  const seconds = { name: "op", title: "Time in a step", columns: [["part", ""], ["time", "seconds"]], rows: op.seconds, total: ["all", secondsOf(op)] };
  markChosen(box);
  return showDetails(op.op, make("p", {}, back), terms, makeTable(seconds));
}
