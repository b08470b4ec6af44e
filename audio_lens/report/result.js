// The figures of results: of each the one that its choices name. `data.results` holds, for every
// section of the page, its figures with the choices that lead to them.

const sections = [...document.querySelectorAll(".result")];

async function show(section, figures) {
  const selects = [...section.querySelectorAll("select")];
  const chosen = figures.find(({ facets }) =>
    selects.every(({ dataset, value }) => facets[dataset.facet] === value));
  if (!chosen) return;
  const plot = section.querySelector(".figure");
  await Plotly.react(plot, chosen.figure.data, themed(chosen.figure.layout), PLOTLY);
}

try {
  const [{ results }] = await Promise.all([unpack("data-gz").then(JSON.parse), loadPlotly()]);
  for (const [index, section] of sections.entries()) {
    section.addEventListener("change", () => show(section, results[index]));
    await show(section, results[index]);
  }
  byId("stage").dataset.ready = "true";
} catch (error) {
  byId("status").textContent = `The figures cannot be drawn here: ${error}`;
  throw error;
}
