// The map under its clips: its choices, and a cell chosen by keys. `data.views` holds one drawn map
// for every choice of result and metric.

const MARK_PX = 15, BESIDE_PX = 190; // of a rank; beside the map: labels and the colour bar

await start(async (data, stage) => {
  const selects = [...document.querySelectorAll("select[data-facet]")];
  const column = Object.fromEntries(data.quantities.map((name, i) => [name, i + 1])); // of customdata
  const steps = { ArrowUp: [1, 0], ArrowDown: [-1, 0], ArrowRight: [0, 1], ArrowLeft: [0, -1] };
  let shown = data.first;
  let chosen = null; // {row, column}, once there is one

  // the ranks are written on cells that are wide enough
  const isWide = ({ x }) => (byId("plot").clientWidth - BESIDE_PX) / (x.length - 1) > MARK_PX;

  // the trace and layout of a view, coloured by a quantity
  function painted({ trace, layout, limits, shades }, quantity) {
    const title = { text: byId("quantity").selectedOptions[0].text };
    const number = (cell) => cell && cell[column[quantity]];
    if (trace.type === "heatmap") {
      const z = trace.customdata.map((row) => row.map(number));
      const limit = Number(quantity === "value" || quantity === "change" ? "" : byId("limit")?.value)
        || limits[quantity];
      const texttemplate = isWide(trace) ? trace.texttemplate : "";
      const colorbar = { ...trace.colorbar, title, ...layout.meta.bar };
      return [{ ...trace, z, zmin: -limit, zmax: limit, colorbar, texttemplate }, layout];
    }
    const y = trace.customdata.map(number);
    const marker = { ...trace.marker, color: shades[quantity] };
    const axis = `yaxis${trace.yaxis.slice(1)}`;
    return [{ ...trace, y, marker }, { ...layout, [axis]: { ...layout[axis], title } }];
  }

  async function show(index) {
    shown = index;
    chosen = null;
    const { facets } = data.views[index];
    selects.forEach((select) => { select.value = facets[select.dataset.facet]; });
    document.querySelectorAll("[data-view]").forEach((part) => {
      part.hidden = Number(part.dataset.view) !== index;
    });
    const [trace, layout] = painted(data.views[index], byId("quantity").value);
    await stage.draw([trace], layout);
    byId("stage").dataset.shown = index;
  }

  // of the views that have what was just chosen, the one most like the last
  function closest(facet, name) {
    const alike = ({ facets }) => selects.filter(({ dataset }) =>
      facets[dataset.facet] === data.views[shown].facets[dataset.facet]).length;
    const having = [...data.views.keys()].filter((i) => data.views[i].facets[facet] === name);
    return having.reduce((a, b) => (alike(data.views[b]) > alike(data.views[a]) ? b : a));
  }

  const cells = () => {
    const { customdata, type } = data.views[shown].trace;
    return type === "heatmap" ? customdata : [customdata];
  };

  // the plotly point of the chosen cell
  function point() {
    const isHeat = data.views[shown].trace.type === "heatmap";
    const pointIndex = isHeat ? [chosen.row, chosen.column] : chosen.column;
    return { data: data.views[shown].trace, pointIndex };
  }

  // the first cell there is, or a step to the next one, over gaps; stay at the border
  function choose([up, right]) {
    const rows = cells();
    let { row, column } = chosen ?? { row: 0, column: -1 };
    const [by, along] = chosen ? [up, right] : [0, 1];
    do [row, column] = [row + by, column + along];
    while (rows[row] && column in rows[row] && !rows[row][column]);
    if (rows[row]?.[column]) chosen = { row, column };
    if (chosen) tell();
  }

  function tell() {
    const [place, ...numbers] = cells()[chosen.row][chosen.column];
    const span = spanOf(point());
    if (span) stage.frame(...span);
    stage.outline(data.views[shown].trace, chosen.row, chosen.column);
    const text = new DOMParser().parseFromString(place, "text/html").documentElement.textContent;
    const { metric } = data.views[shown].facets;
    const told = numbers.map((x, i) => [data.quantities[i], x ?? NaN])
      .filter(([name]) => name === "value" || !data.unsaid.includes(name))
      .map(([name, x]) => `${name === "value" ? metric : name} ${x}`);
    say(`${text}: ${told.join(", ")}`);
  }

  selects.forEach((select) => {
    select.addEventListener("change", async () => {
      await show(closest(select.dataset.facet, select.value));
      say("");
    });
  });
  for (const id of ["quantity", "limit"]) byId(id)?.addEventListener("change", () => show(shown));
  byId("stage").addEventListener("keydown", (event) => {
    if (event.key in steps) choose(steps[event.key]);
    else if (event.key === "Enter") { if (chosen) stage.playPoint(point(), event.shiftKey); }
    else return;
    event.preventDefault();
  });
  await show(data.first);
  stage.on("plotly_click", ({ points: [{ data: { name }, pointIndex }] }) => {
    if (name !== "map") return;
    const [row, at] = [pointIndex].flat().length > 1 ? pointIndex : [0, pointIndex];
    chosen = { row, column: at };
    stage.outline(data.views[shown].trace, row, at);
  });
});
