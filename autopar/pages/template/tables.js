// Tables that sort: the library listens for clicks on headings of tables of the class "sortable".

/** A table of plain values; `onRow`, where given, is called with a row's number by the button in its first cell. */
function makeTable(table, onRow = null) {
  const isNumber = table.columns.map(([, unit]) => unit !== "");
  const classes = (column) => (isNumber[column] ? "number" : null);
  const head = make("tr", {}, ...table.columns.map(([name], column) =>
    make("th", { scope: "col", class: classes(column) }, make("button", { type: "button" }, name))));
  const cell = (value, column, content) => {
    const attributes = { class: classes(column) };
    if (isNumber[column]) attributes["data-sort"] = value === null ? "" : String(value);
    return make("td", attributes, content);
  };
  const body = table.rows.map((row, number) => make("tr", {}, ...row.map((value, column) => {
    const text = format(value, table.columns[column][1]);
    const isChoice = onRow !== null && column === 0;
    return cell(value, column, isChoice ? make("button", { type: "button", class: "link", onclick: () => onRow(number) }, text) : text);
  })));
  const total = table.total.length === 0 ? null
    : make("tfoot", {}, make("tr", {}, ...table.total.map((value, column) => cell(value, column, format(value, table.columns[column][1])))));
  const element = make("table", { class: "sortable n-last" }, make("caption", {}, table.title), make("thead", {}, head), make("tbody", {}, ...body), total);
  return make("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": table.title }, element);
}

const OPEN_TABLES = ["step", "memory", "groups", "traffic"];

/** The tables of the page; those that are closed are made when they are opened, since some are long. */
function showTables() {
  for (const table of data.tables) {
    const count = `${formatCount(table.rows.length)} row${table.rows.length === 1 ? "" : "s"}`;
    const summary = make("summary", {}, make("h3", {}, table.title), make("span", { class: "note" }, count));
    const details = make("details", { id: `table-${table.name}` }, summary);
    const fill = () => {
      if (details.childElementCount === 1) details.append(make("p", { class: "note" }, table.note), makeTable(table));
    };
    details.addEventListener("toggle", fill);
    if (OPEN_TABLES.includes(table.name)) {
      fill();
      details.open = true;
    }
    byId("tables").append(details);
  }
  if (data.notes.length > 0) {
    byId("tables").append(make("h3", {}, "Notes"), make("ul", { id: "notes" }, ...data.notes.map((note) => make("li", {}, note))));
  }
}
