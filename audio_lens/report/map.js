// The map under its clips: its choices, and a cell chosen by keys. `data.views` holds one drawn map
// for every choice of result and metric.

await start(async (data, stage) => {
  const selects = [...document.querySelectorAll("select[data-facet]")];
  const column = { effect: 1, recovery: 2, value: 3 }; // in the customdata of a cell
  const steps = { ArrowUp: [1, 0], ArrowDown: [-1, 0], ArrowRight: [0, 1], ArrowLeft: [0, -1] };
  let shown = data.first;
  let chosen = { row: 0, column: 0 };

  // the trace and layout of a view, coloured by a quantity
  function painted({ trace, layout, limits, shades }, quantity) {
    const title = { text: byId("quantity").selectedOptions[0].text };
    const number = (cell) => cell && cell[column[quantity]];
    if (trace.type === "heatmap") {
      const z = trace.customdata.map((row) => row.map(number));
      const limit = limits[quantity];
      const colorbar = { ...trace.colorbar, title, ...layout.meta.bar };
      return [{ ...trace, z, zmin: -limit, zmax: limit, colorbar }, layout];
    }
    const y = trace.customdata.map(number);
    const marker = { ...trace.marker, color: shades[quantity] };
    const axis = `yaxis${trace.yaxis.slice(1)}`;
    return [{ ...trace, y, marker }, { ...layout, [axis]: { ...layout[axis], title } }];
  }

  async function show(index) {
    shown = index;
    chosen = { row: 0, column: 0 };
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

  // go a step to the next cell, over gaps; stay at the border
  function choose([up, right]) {
    const rows = cells();
    let { row, column } = chosen;
    do [row, column] = [row + up, column + right];
    while (rows[row] && column in rows[row] && !rows[row][column]);
    if (rows[row]?.[column]) chosen = { row, column };
    const [place, ...numbers] = rows[chosen.row][chosen.column];
    const [effect, recovery, value] = numbers.map((x) => x ?? NaN);
    const span = spanOf(point());
    if (span) stage.frame(...span);
    stage.outline(data.views[shown].trace, chosen.row, chosen.column);
    const text = new DOMParser().parseFromString(place, "text/html").documentElement.textContent;
    const { metric } = data.views[shown].facets;
    say(`${text}: effect ${effect}, recovery ${recovery}, ${metric} ${value}`);
  }

  selects.forEach((select) => {
    select.addEventListener("change", () => show(closest(select.dataset.facet, select.value)));
  });
  byId("quantity").addEventListener("change", () => show(shown));
  byId("stage").addEventListener("keydown", (event) => {
    if (event.key in steps) choose(steps[event.key]);
    else if (event.key === "Enter") stage.playPoint(point());
    else return;
    event.preventDefault();
  });
  await show(data.first);
});
