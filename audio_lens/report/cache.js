// Layers by positions under the clip. `data.parts` holds axes and traces of every part (audio on its
// seconds, text beside it), `data.views` the numbers that can be shown, by stream and column; columns
// count through audio and text.

const LETTER_PX = 7.5, BESIDE_PX = 190; // beside the panels: labels and the colour bar

const unmarked = (text) => new DOMParser()
  .parseFromString(text.replaceAll("<br>", ", "), "text/html").documentElement.textContent;

// a label in so many letters, without the blank that most words begin with; empty where that says
// nothing
function fitting(label, room) {
  const text = unmarked(label).replace(/^␣(?=.)/, "");
  if (text.length <= room) return marked(text);
  return room >= 3 ? marked(`${text.slice(0, room - 1)}…`) : "";
}

await start(async (data, stage) => {
  const select = byId("view");
  const steps = { ArrowUp: [1, 0], ArrowDown: [-1, 0], ArrowRight: [0, 1], ArrowLeft: [0, -1] };
  let chosen = null; // {row, column}

  const view = () => data.views[Number(select.value)];
  const part = () => data.parts[view().part];
  const nAudio = () => Math.max(0, part().edges.length - 1);
  const offset = (trace) => (part().traces[trace].name === "text" ? nAudio() : 0);

  // what a cell says: its likeliest tokens, or its number
  function told(row, column) {
    const { key, z, tokens, probs, strings, label } = view();
    if (key === "norm") return `norm ${(10 ** z[row][column]).toPrecision(3)}`;
    if (key !== "lens") return `${marked(label)}: ${z[row][column].toFixed(3)}`;
    return tokens[row][column]
      .map((token, k) => `${strings[token]} ${probs[row][column][k].toFixed(3)}`).join("<br>");
  }

  const placeOf = (row, column) => `layer ${part().streams[row]}, ${part().names.flat()[column]}`;

  // tokens written on the cells of a row where they fit; in time, once for neighbours that agree
  function written(trace, row) {
    const { key, tokens, strings, blank } = view();
    const { edges, names } = part();
    const count = names[trace].length;
    const texts = Array(count).fill("");
    if (key !== "lens") return texts;
    const isTimed = part().traces[trace].name === "audio";
    const width = byId("plot")._fullLayout?.xaxis._length ?? byId("plot").clientWidth - BESIDE_PX;
    const likeliest = (column) => tokens[row][column + offset(trace)][0];
    const size = (first, last) =>
      (isTimed ? (edges[last + 1] - edges[first]) / (edges.at(-1) - edges[0]) : 1 / count);
    for (let first = 0, last; first < count; first = last + 1) {
      last = first;
      while (isTimed && last + 1 < count && likeliest(last + 1) === likeliest(first)) last += 1;
      if (likeliest(first) === blank) continue;
      const room = Math.floor((width * size(first, last)) / LETTER_PX);
      texts[(first + last) >> 1] = fitting(strings[likeliest(first)], room);
    }
    return texts;
  }

  function painted() {
    const { z, style } = view();
    return part().traces.map((trace, index) => {
      const [from, count] = [offset(index), part().names[index].length];
      const cells = (make) => z.map((_, row) =>
        Array.from({ length: count }, (_, column) => make(row, from + column)));
      return {
        ...trace, ...style, showscale: index === 0,
        z: cells((row, column) => z[row][column]),
        customdata: cells((row, column) => `${placeOf(row, column)}<br>${told(row, column)}`),
        hovertemplate: "%{customdata}<extra></extra>",
        text: z.map((_, row) => written(index, row)),
        texttemplate: "%{text}",
        textfont: { size: 11 },
      };
    });
  }

  async function show() {
    document.querySelectorAll("[data-part]").forEach((table) => {
      table.hidden = table.dataset.part !== view().part;
    });
    await stage.draw(painted(), part().layout);
    byId("stage").dataset.shown = `${view().part} ${view().key}`;
    const { streams, names } = part();
    chosen = { row: streams.length - 1, column: names.flat().length - 1 };
    if (nAudio() < names.flat().length) tell(); // behind the last token stands what was asked for
    else say("");
  }

  // trace and column in it of the chosen cell
  function located() {
    const isText = chosen.column >= nAudio();
    const trace = part().traces.findIndex(({ name }) => name === (isText ? "text" : "audio"));
    return [trace, chosen.column - offset(trace)];
  }

  // the plotly point of the chosen cell
  function point() {
    const [trace, column] = located();
    return { data: part().traces[trace], pointIndex: [chosen.row, column] };
  }

  function choose([up, right]) {
    const within = (x, count) => Math.min(Math.max(x, 0), count - 1);
    const { streams, names } = part();
    chosen = {
      row: within(chosen.row + up, streams.length),
      column: within(chosen.column + right, names.flat().length),
    };
    tell();
  }

  function tell() {
    const [trace, column] = located();
    stage.outline(part().traces[trace], chosen.row, column);
    const span = spanOf(point());
    if (span) stage.frame(...span);
    else stage.hideFrame();
    say(unmarked(`${placeOf(chosen.row, chosen.column)}: ${told(chosen.row, chosen.column)}`));
  }

  select.addEventListener("change", show);
  byId("stage").addEventListener("keydown", (event) => {
    if (event.key in steps) choose(steps[event.key]);
    else if (event.key === "Enter") stage.playPoint(point(), event.shiftKey);
    else return;
    event.preventDefault();
  });
  await show();
  stage.on("plotly_click", ({ points: [{ data: { name }, pointIndex }] }) => {
    const at = part().traces.findIndex((trace) => trace.name === name);
    if (at < 0) return;
    chosen = { row: pointIndex[0], column: pointIndex[1] + offset(at) };
    stage.outline(part().traces[at], ...pointIndex);
  });
});
