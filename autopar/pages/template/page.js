// The page from its data, when everything above is defined.

function showHeader() {
  byId("lead").append(...data.lead.flatMap(([label, text]) => [make("dt", {}, label), make("dd", {}, text)]));
  byId("figures").append(...data.figures.map(([label, value, unit, remark]) =>
    make("div", {}, make("dt", {}, label), make("dd", {}, format(value, unit)), remark === "" ? null : make("dd", { class: "note" }, remark))));
}

showHeader();
document.querySelector("main").hidden = false; // charts measure the place that they have
showGraph();
showTimeline();
showTables();
