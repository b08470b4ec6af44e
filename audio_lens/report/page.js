"use strict";
(async () => {
  const byId = (id) => document.getElementById(id);
  const fromBase64 = (text) => Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
  const read = (id) => JSON.parse(byId(id).textContent);

  // plotly.js travels compressed, a third of its size
  async function loadPlotly() {
    const packed = new Blob([fromBase64(byId("plotly-gz").textContent)]).stream();
    const plain = packed.pipeThrough(new DecompressionStream("gzip"));
    const script = document.createElement("script");
    script.textContent = await new Response(plain).text();
    document.head.append(script);
  }

  await loadPlotly();
  const figure = read("figure");
  const windows = read("windows");
  const plot = byId("plot");
  const stage = byId("stage");
  const cursor = byId("cursor");
  const frame = byId("window");
  const status = byId("status");
  const players = [...document.querySelectorAll("audio")];
  const mapTrace = figure.data.findIndex((trace) => trace.name === "map");
  const offline = { showSendToCloud: false, plotlyServerURL: "", displaylogo: false };
  const unused = { modeBarButtonsToRemove: ["select2d", "lasso2d", "autoScale2d"] };
  const config = { ...offline, ...unused, responsive: true };
  await Plotly.newPlot(plot, figure.data, figure.layout, config);

  // where seconds lie on the screen: the rows above the map, and the map where it has time
  const layout = () => plot._fullLayout;
  function rows() {
    const axes = Object.keys(layout()).filter((key) => /^yaxis\d*$/.test(key));
    const shown = axes.map((key) => layout()[key]);
    const timed = windows.length ? shown : shown.slice(0, -1);
    const bottoms = timed.map((axis) => axis._offset + axis._length);
    return { top: Math.min(...timed.map((axis) => axis._offset)), bottom: Math.max(...bottoms) };
  }
  function place(box, start, end) {
    const axis = layout().xaxis;
    const clip = (x) => Math.min(Math.max(axis.l2p(x), 0), axis._length);
    const { top, bottom } = rows();
    const [left, right] = [clip(start), clip(end)];
    box.style.left = `${axis._offset + left}px`;
    box.style.top = `${top}px`;
    box.style.height = `${bottom - top}px`;
    if (box === frame) box.style.width = `${right - left}px`;
    box.style.display = "block";
  }

  // sound: whole clips by the browser's player, stretches by Web Audio, exact to the sample
  let current = 0;
  let context = null;
  let stretch = null;
  const decoded = [];
  async function sound(index) {
    context ??= new AudioContext();
    await context.resume();
    const bytes = () => fromBase64(players[index].src.split(",")[1]).buffer;
    return (decoded[index] ??= await context.decodeAudioData(bytes()));
  }
  async function play(start, end) {
    const buffer = await sound(current);
    players.forEach((player) => player.pause());
    stretch?.source.stop();
    const source = context.createBufferSource();
    source.buffer = buffer;
    source.connect(context.destination);
    const playing = { source, start, began: context.currentTime };
    source.onended = () => { if (stretch === playing) stretch = null; };
    stretch = playing;
    source.start(0, start, end - start);
    place(frame, start, end);
    stage.dataset.played = `${start} ${end}`;
    const name = document.querySelectorAll(".clip")[current].textContent.trim();
    status.textContent = `${name}, ${start.toFixed(2)}–${end.toFixed(2)} s`;
    follow();
  }
  let heard = null; // seconds
  function moveCursor(seconds) {
    heard = seconds;
    if (heard !== null) place(cursor, heard, heard);
  }
  function follow() {
    const player = players[current];
    if (stretch) moveCursor(stretch.start + context.currentTime - stretch.began);
    else if (!player.paused) moveCursor(player.currentTime);
    else return;
    requestAnimationFrame(follow);
  }
  players.forEach((player) => {
    player.addEventListener("play", () => { stretch?.source.stop(); stretch = null; follow(); });
    player.addEventListener("seeked", () => moveCursor(player.currentTime));
  });
  document.querySelectorAll("input[name=clip]").forEach((input) => {
    input.addEventListener("change", () => {
      players.forEach((player) => player.pause());
      current = Number(input.value);
      players.forEach((player, index) => { player.hidden = index !== current; });
      figure.data.forEach((trace, index) => {
        if (typeof trace.meta !== "number") return;
        Plotly.restyle(plot, { visible: trace.meta === current }, [index]);
      });
    });
  });
  document.querySelectorAll("button[data-start]").forEach((button) => {
    button.addEventListener("click", () => play(+button.dataset.start, +button.dataset.end));
  });

  // pointer and keys on the picture
  function stretchOf(point) {
    if (point.data.name === "words") return point.customdata;
    if (point.data.name !== "map") return null;
    return windows[Array.isArray(point.pointIndex) ? point.pointIndex[1] : point.pointIndex] ?? null;
  }
  plot.on("plotly_hover", ({ points: [point] }) => {
    const found = stretchOf(point);
    if (found) place(frame, ...found);
  });
  plot.on("plotly_unhover", () => { frame.style.display = "none"; });
  plot.on("plotly_relayout", () => { frame.style.display = "none"; moveCursor(heard); });
  plot.on("plotly_click", ({ points: [point] }) => {
    const found = stretchOf(point);
    if (found) play(...found);
    else if (typeof point.data.meta === "number") players[current].currentTime = point.x;
  });

  const heat = figure.data[mapTrace];
  const isHeatmap = heat.type === "heatmap"; // else bars
  const nRows = isHeatmap ? heat.z.length : 1;
  const chosen = { row: 0, column: 0 };
  const steps = { ArrowUp: [1, 0], ArrowDown: [-1, 0], ArrowRight: [0, 1], ArrowLeft: [0, -1] };
  function choose([up, right]) {
    const bounded = (at, size) => Math.min(Math.max(at, 0), size - 1);
    chosen.row = bounded(chosen.row + up, nRows);
    do chosen.column = bounded(chosen.column + right, windows.length);
    while (right && !windows[chosen.column]);
    const data = isHeatmap ? heat.customdata[chosen.row][chosen.column] : heat.customdata[chosen.column];
    status.textContent = `${data[0]}: effect ${data[1]}`;
    place(frame, ...windows[chosen.column]);
  }
  stage.addEventListener("keydown", (event) => {
    if (!windows.length) return;
    if (event.key in steps) choose(steps[event.key]);
    else if (event.key === "Enter") play(...windows[chosen.column]);
    else return;
    event.preventDefault();
  });
  stage.dataset.ready = "true";
})().catch((error) => {
  document.getElementById("status").textContent = `The picture cannot be drawn here: ${error}`;
});
