// A head's pattern under its clip. `data.views` holds one site each: patterns as letters, one per
// query and stretch of the clip (see Attention.letters), and what its queries are called.

const LEAST_S = 0.1; // shorter stretches are played a little longer
const RANK = new Uint8Array(128);

// the shortest time that holds a part of a row, as [[start, end], ...]: its strongest stretches,
// neighbours joined
function stretches(row, edges, part) {
  const density = (i) => row[i] / (edges[i + 1] - edges[i]);
  const order = [...row.keys()].sort((a, b) => density(b) - density(a));
  let missing = part * row.reduce((a, b) => a + b, 0);
  const taken = [];
  for (const i of order) {
    if (missing <= 1e-9) break;
    taken.push(i);
    missing -= row[i];
  }
  return joined(taken.sort((a, b) => a - b).map((i) => [edges[i], edges[i + 1]]));
}

function joined(spans) {
  const found = [];
  for (const [start, end] of spans) {
    const last = found.at(-1);
    if (last && start <= last[1] + 1e-6) last[1] = end;
    else found.push([start, end]);
  }
  return found;
}

// stretches long enough to be heard
function audible(spans, seconds) {
  return joined(spans.map(([start, end]) => {
    const more = Math.max(0, LEAST_S - (end - start)) / 2;
    return [Math.max(0, start - more), Math.min(seconds, end + more)];
  }));
}

await start(async (data, stage) => {
  [...data.letters].forEach((letter, rank) => { RANK[letter.charCodeAt(0)] = rank; });
  const [site, layer, head, colours, part, naming] =
    ["site", "layer", "head", "colours", "part", "rows"].map(byId);
  let query = null; // the chosen row
  let queue = []; // stretches still to be played
  let playing = null; // the stretch of the queue that is heard now

  const view = () => data.views[Number(site.value)];
  const number = (select) => select.selectedIndex;

  // what a row is called: the token that it decides on, or the one that is read there
  const isOfNext = () => naming.value === "decides" && view().decides.length > 0;
  const labelOf = (row) => (isOfNext() ? view().decides : view().queries.map(({ label }) => label))[row];
  const cut = (text) => (text.length <= data.most ? text : `${text.slice(0, data.most - 1)}…`);

  // the layout with the rows called so
  function named({ layout, traces: [, heat], timed }) {
    const axis = `yaxis${heat.yaxis.slice(1)}`;
    const { tickvals } = layout[axis];
    if (timed || !tickvals) return layout;
    const ticktext = Array.from(tickvals, (row) => marked(cut(labelOf(row))));
    return { ...layout, [axis]: { ...layout[axis], ticktext } };
  }

  // the shares of the chosen head, row by row
  function pattern() {
    const { shares, peaks, edges } = view();
    const letters = shares[number(layer)][number(head)];
    const peak = peaks[number(layer)][number(head)];
    const width = edges.length - 1;
    const share = (i) => peak * (RANK[letters.charCodeAt(i)] / (data.letters.length - 1)) ** 2;
    return view().queries.map((_, row) =>
      Array.from({ length: width }, (_, column) => share(row * width + column)));
  }

  const mean = (rows) => rows[0].map((_, i) => rows.reduce((sum, row) => sum + row[i], 0) / rows.length);
  const listened = (rows) => query === null ? [] : stretches(rows[query], view().edges, Number(part.value));

  function painted(rows) {
    const { traces: [profile, heat], edges } = view();
    const perRow = colours.value === "row";
    const peakOf = (row) => Math.max(...row) || 1;
    const z = perRow ? rows.map((row) => row.map((x) => x / peakOf(row))) : rows;
    const zmax = perRow ? 1 : Math.max(...rows.map(peakOf));
    const hover = rows.map((row, i) => row.map((x) =>
      `${marked(labelOf(i))}: ${(100 * x).toFixed(2)} %`));
    const widths = edges.slice(1).map((end, i) => end - edges[i]);
    const centres = edges.slice(1).map((end, i) => (end + edges[i]) / 2);
    const y = query === null ? mean(rows) : rows[query];
    return [
      { ...profile, x: centres, width: widths, y },
      { ...heat, z, zmax, customdata: hover,
        hovertemplate: "%{customdata}<br>at %{x:.2f} s<extra></extra>" },
    ];
  }

  // boxes around the chosen row and, above the pattern, over what it listened to
  function boxes(rows) {
    const { layout, traces: [, heat], queries, timed } = view();
    if (query === null) return [];
    const [low, high] = timed ? queries[query].span : [query - 0.5, query + 0.5];
    const [, top] = layout[`yaxis${heat.yaxis.slice(1)}`].domain;
    const line = { color: "#c98112", width: 2 };
    const chosen = { type: "rect", xref: "paper", x0: 0, x1: 1, yref: heat.yaxis, y0: low, y1: high, line };
    const heard = listened(rows).map(([x0, x1]) => ({
      type: "rect", xref: "x", x0, x1, yref: "paper", y0: top, y1: 1,
      fillcolor: "rgba(232, 163, 61, .22)", line: { width: 0 },
    }));
    return [...heard, chosen];
  }

  async function draw() {
    const rows = pattern();
    await stage.draw(painted(rows), { ...named(view()), shapes: boxes(rows) });
    byId("naming").hidden = !view().decides.length;
    byId("of-layer").textContent = layer.value;
    byId("share-head").textContent = view().share_head;
    byId("how").textContent = view().how;
    fillQueries();
    fillSummary();
    fillGrid();
    byId("stage").dataset.shown = [view().site, layer.value, head.value, query ?? ""].join(" ");
  }

  const fill = (select, numbers) =>
    select.replaceChildren(...numbers.map((n) => new Option(n, n)));

  function fillQueries() {
    const { queries, timed } = view();
    const button = (label, i) => {
      const made = Object.assign(document.createElement("button"), { type: "button", textContent: label });
      made.setAttribute("aria-pressed", i === query);
      made.addEventListener("click", () => choose(i, true));
      return made;
    };
    const held = document.activeElement?.closest("#queries");
    byId("queries").replaceChildren(...(timed ? [] : queries.map((_, i) => button(labelOf(i), i))));
    if (held) byId("queries").children[query]?.focus();
  }

  function fillSummary() {
    const rows = view().summary.filter(([of]) => String(of) === layer.value);
    byId("summary").tBodies[0].replaceChildren(...rows.map(([, n, onAudio, entropy, peak]) => {
      const row = document.createElement("tr");
      if (String(n) === head.value) row.setAttribute("aria-current", "true");
      const button = Object.assign(document.createElement("button"), { type: "button", textContent: n });
      button.setAttribute("aria-label", `Show head ${n}`);
      button.addEventListener("click", () => { head.value = n; redraw(); });
      row.insertCell().append(button);
      const cells = [`${(100 * onAudio).toFixed(1)} %`, entropy.toFixed(2), peak.toFixed(2)];
      cells.forEach((text) => { row.insertCell().textContent = text; });
      return row;
    }));
  }

  // every head's pattern, small; drawn once a site, when somebody looks
  function fillGrid() {
    const grid = byId("grid");
    if (!byId("every").open) return;
    if (grid.dataset.site !== site.value) {
      grid.dataset.site = site.value;
      const { layers, heads } = view();
      grid.style.gridTemplateColumns = `max-content repeat(${heads.length}, minmax(0, 1fr))`;
      grid.replaceChildren(...layers.flatMap((l, i) => [
        Object.assign(document.createElement("span"), { textContent: `layer ${l}` }),
        ...heads.map((h, j) => thumbnail(i, j, `layer ${l}, head ${h}`)),
      ]));
    }
    const chosen = `layer ${layer.value}, head ${head.value}`;
    grid.querySelectorAll("button").forEach((one) => one.setAttribute("aria-pressed", one.title === chosen));
  }

  function thumbnail(i, j, title) {
    const { shares, edges, queries, timed } = view();
    const [width, height] = [edges.length - 1, queries.length];
    const canvas = Object.assign(document.createElement("canvas"), { width, height });
    const pixels = new ImageData(width, height);
    for (let at = 0; at < width * height; at += 1) {
      const row = Math.floor(at / width);
      const to = (timed ? height - 1 - row : row) * width + (at % width); // seconds go upwards
      const shade = RANK[shares[i][j].charCodeAt(at)] / (data.letters.length - 1);
      pixels.data.set([33, 113, 181, 255 * shade], 4 * to);
    }
    canvas.getContext("2d").putImageData(pixels, 0, 0);
    const made = Object.assign(document.createElement("button"), { type: "button", title });
    made.append(canvas);
    made.addEventListener("click", () => {
      [layer.selectedIndex, head.selectedIndex] = [i, j];
      redraw();
    });
    return made;
  }

  // another head or another way to see it: the words below the picture are of that
  async function redraw() {
    await draw();
    say(query === null ? "" : describe(pattern()));
  }

  function describe(rows) {
    const { on_audio: onAudio, share_of: shareOf } = view();
    const share = onAudio[number(layer)][number(head)][query];
    const spans = listened(rows).map((span) => inSeconds(...span)).join(", ");
    const held = spans ? `; ${part.selectedOptions[0].text.replace("what holds ", "")} of that in ${spans}` : "";
    const deciding = isOfNext() ? "deciding " : "";
    return `${deciding}${labelOf(query)}: ${(100 * share).toFixed(1)} % ${shareOf}${held}`;
  }

  async function choose(index, plays = false) {
    queue = [];
    query = index;
    await draw();
    if (plays) await playListened();
    say(describe(pattern()));
  }

  async function playListened() {
    if (query === null) return;
    queue = audible(listened(pattern()), data.views[0].layout.xaxis.range[1]);
    await playNext();
    say(describe(pattern()));
  }

  async function playNext() {
    const next = queue.shift();
    if (next) {
      playing = next;
      await stage.play(...next);
    }
  }

  // one stretch after the other, unless somebody stops or plays something else
  const stopped = stage.sound.onstop;
  stage.sound.onstop = async (at) => {
    stopped(at);
    const isOver = playing && at > playing[1] - 0.03;
    playing = null;
    if (!isOver) queue = [];
    else if (queue.length) {
      await playNext();
      say(describe(pattern()));
    }
  };

  // show a site, at first by the head that attends most to one place
  function chooseSite() {
    const { layers, heads, peaks } = view();
    const sharpest = peaks.map((of) => Math.max(...of));
    [query, queue] = [null, []];
    fill(layer, layers);
    fill(head, heads);
    layer.selectedIndex = sharpest.indexOf(Math.max(...sharpest));
    head.selectedIndex = peaks[number(layer)].indexOf(Math.max(...sharpest));
    return draw();
  }

  // a step to the next option of a select, staying at the ends
  function step(select, by) {
    const next = select.selectedIndex + by;
    if (next < 0 || next >= select.options.length) return;
    select.selectedIndex = next;
    redraw();
  }

  const down = () => (view().timed ? -1 : 1); // rows of seconds go upwards
  const last = () => view().queries.length - 1;
  const move = (by) => choose(query === null ? 0 : Math.min(Math.max(query + by, 0), last()));
  const keys = {
    ArrowDown: () => move(down()),
    ArrowUp: () => move(-down()),
    ArrowRight: () => step(head, 1),
    ArrowLeft: () => step(head, -1),
    Enter: playListened,
  };

  site.addEventListener("change", async () => {
    await chooseSite();
    say("");
  });
  [layer, head, colours, part, naming].forEach((select) => select.addEventListener("change", redraw));
  byId("every").addEventListener("toggle", fillGrid);
  byId("stage").addEventListener("keydown", (event) => {
    if (!(event.key in keys)) return;
    keys[event.key]();
    event.preventDefault();
  });
  await chooseSite();
  stage.on("plotly_click", ({ points: [point] }) => {
    if (point.data.name === "attention") choose([point.pointIndex].flat()[0], true);
  });
});
