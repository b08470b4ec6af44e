// Latents and the clips that excite them. `data.features` holds for each its moments (a clip, the
// stretch that plays, the course over the clip), what is said there, and what it does.

const WAVE = "#9aa5ad", ACTIVE = "rgba(232, 131, 20, 0.75)", SAID = "#55606a", CURSOR = "#23292e";
const LINE_PX = 14; // of a tier
const say = (text) => { byId("status").textContent = text; };

function element(name, text = "", className = "") {
  const made = document.createElement(name);
  made.textContent = text;
  if (className) made.className = className;
  return made;
}

// a canvas as sharp as the screen, and what draws on it in CSS pixels
function sharp(canvas) {
  const { clientWidth: width, clientHeight: height } = canvas, ratio = window.devicePixelRatio || 1;
  [canvas.width, canvas.height] = [width * ratio, height * ratio];
  const pen = canvas.getContext("2d");
  pen.scale(ratio, ratio);
  pen.clearRect(0, 0, width, height);
  return { pen, width, height };
}

function drawCourse(pen, { seconds, values }, peak, x, base, height) {
  pen.fillStyle = ACTIVE;
  const half = seconds.length > 1 ? (seconds[1] - seconds[0]) / 2 : 0.01;
  values.forEach((value, i) => {
    const tall = height * value / peak;
    pen.fillRect(x(seconds[i] - half), base - tall, Math.max(1, x(2 * half) - x(0)), tall);
  });
}

function drawMoment(canvas, moment, clip, peak, at) {
  const { pen, width, height } = sharp(canvas);
  const x = (second) => width * second / clip.seconds;
  const tiers = Object.values(clip.tiers), base = height - LINE_PX * tiers.length - 2;
  pen.strokeStyle = WAVE;
  pen.beginPath();
  clip.wave.forEach((level, i) => {
    pen[i ? "lineTo" : "moveTo"](x(i * clip.step), base / 2 - level / 100 * base * 0.45);
  });
  pen.stroke();
  drawCourse(pen, moment, peak, x, base, base * 0.95);
  pen.fillStyle = SAID;
  pen.font = "11px system-ui, sans-serif";
  tiers.forEach((spans, row) => spans.forEach(([start, end, label]) => {
    const top = base + 2 + LINE_PX * row;
    pen.fillRect(x(start), top, 1, LINE_PX);
    pen.fillText(label, x(start) + 3, top + 11, Math.max(1, x(end) - x(start) - 3));
  }));
  if (at === null) return;
  pen.fillStyle = CURSOR;
  pen.fillRect(x(at), 0, 1.5, base);
}

const percent = (share) => `${(100 * share).toPrecision(share < 0.1 ? 2 : 3)} %`;
const saidAs = ({ said }) => said.map(([tier, label, share]) =>
  `${(100 * share).toFixed(0)} % of its strongest moments on “${label}” (${tier})`).join(", ");

try {
  const data = await unpack("data-gz").then(JSON.parse);
  const sound = new Sound(data.clips, data.rate);
  const [gallery, moments, stage] = ["gallery", "moments", "stage"].map(byId);
  let chosen = 0; // the feature
  let heard = null; // the moment that plays
  let drawn = []; // [canvas, moment] of the chosen feature

  const feature = () => data.features[chosen];
  const peakOf = ({ moments }) => Math.max(...moments.map(({ value }) => value), 1e-9);
  const draw = (canvas, moment, at = null) =>
    drawMoment(canvas, moment, data.clips[moment.clip], peakOf(feature()), at);

  async function play(moment, [start, end]) {
    heard = moment;
    sound.current = moment.clip;
    await sound.play(start, end);
    stage.dataset.played = `${moment.clip} ${start}`;
    say(`${data.clips[moment.clip].name}, from ${start.toFixed(2)} s`);
  }

  function atHeard(second) {
    for (const [canvas, moment] of drawn) if (moment === heard) draw(canvas, moment, second);
  }
  sound.onmove = atHeard;
  sound.onstop = () => atHeard(null);

  function row(moment) {
    const line = element("div", "", "moment"), about = element("div"), canvas = element("canvas");
    const clip = data.clips[moment.clip];
    const here = element("button", `▶ ${moment.play[0].toFixed(2)} s`);
    here.type = "button";
    here.setAttribute("aria-label", `Play ${clip.name} from the moment at which it becomes active`);
    here.addEventListener("click", () => play(moment, moment.play));
    const all = element("button", "whole clip");
    all.type = "button";
    all.addEventListener("click", () => play(moment, [0, clip.seconds]));
    about.append(here, " ", all, element("small", `${clip.name}: ${moment.value.toPrecision(3)}`));
    canvas.addEventListener("click", ({ offsetX }) =>
      play(moment, [clip.seconds * offsetX / canvas.clientWidth, clip.seconds]));
    line.append(about, canvas);
    drawn.push([canvas, moment]);
    return line;
  }

  function effectRow([answer, before, after]) {
    const line = element("tr"), change = after - before;
    line.append(element("td", answer, "text"), element("td", before.toFixed(3)),
      element("td", after.toFixed(3)),
      element("td", `${change >= 0 ? "+" : ""}${change.toFixed(3)}`, change >= 0 ? "rises" : "falls"));
    return line;
  }

  function show(number) {
    chosen = (number + data.features.length) % data.features.length;
    sound.stop();
    drawn = [];
    const { latent, share, peak, effects } = feature();
    byId("name").textContent = `Latent ${latent}`;
    byId("told").textContent = [`active at ${percent(share)} of the positions`,
      `peak ${peak.toPrecision(3)}`, saidAs(feature())].filter(Boolean).join("; ");
    moments.replaceChildren(...feature().moments.map(row));
    if (!drawn.length) moments.textContent = "It is never active in these clips.";
    byId("effects").tBodies[0].replaceChildren(...effects.map(effectRow));
    byId("effects").closest("section").hidden = !effects.length;
    drawn.forEach(([canvas, moment]) => draw(canvas, moment));
    [...gallery.children].forEach((card, i) => card.setAttribute("aria-pressed", i === chosen));
    stage.dataset.latent = latent;
  }

  gallery.append(...data.features.map((one, i) => {
    const card = element("button", "", "card"), canvas = element("canvas");
    card.type = "button";
    card.append(element("b", `Latent ${one.latent}`), canvas, element("span", saidAs(one) || percent(one.share)));
    card.addEventListener("click", () => show(i));
    return card;
  }));
  data.features.forEach((one, i) => {
    if (!one.moments.length) return;
    const { pen, width, height } = sharp(gallery.children[i].querySelector("canvas"));
    const clip = data.clips[one.moments[0].clip];
    drawCourse(pen, one.moments[0], peakOf(one), (s) => width * s / clip.seconds, height, height);
  });
  stage.addEventListener("keydown", (event) => {
    const { key } = event;
    if (key === "ArrowRight" || key === "ArrowDown") show(chosen + 1);
    else if (key === "ArrowLeft" || key === "ArrowUp") show(chosen - 1);
    else if (key === " " && drawn.length) play(drawn[0][1], drawn[0][1].play);
    else if (key === "Escape") sound.stop();
    else return;
    event.preventDefault();
  });
  window.addEventListener("resize", () => drawn.forEach(([canvas, moment]) => draw(canvas, moment)));
  show(0);
  stage.dataset.ready = "true";
} catch (error) {
  say(`The latents cannot be shown here: ${error}`);
  throw error;
}
