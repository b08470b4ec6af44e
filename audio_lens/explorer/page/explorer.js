// The explorer: what is touched goes to Python as messages, what comes back is shown.
// `link.ask(message, content)` gives the events that answer a message.

const SKELETON = `
<header class="row top">
  <div class="brand"><strong>audio_lens</strong><span data-is="model"></span></div>
  <form data-is="asking" class="row grow">
    <label class="grow"><span data-is="question-label">Question</span><input data-is="question" maxlength="4000" autocomplete="off" spellcheck="false"></label>
    <button>Ask</button>
  </form>
</header>
<p data-is="problem" class="problem" role="alert" hidden></p>
<div class="columns">
  <div class="left">
    <section class="card" data-is="drop">
      <div class="row">
        <button data-is="play" class="main" title="Space">▶ Play</button>
        <span class="file" data-is="clip"></span>
        <button data-is="open">Open…</button>
        <button data-is="record" title="Record with the microphone">● Record</button>
        <span class="grow"></span>
        <span class="row"><span class="soft">other clip</span><span class="file" data-is="other">none</span>
        <button data-is="hear-other" hidden aria-label="Play the other clip">▶</button>
        <button data-is="open-other" aria-label="Open another clip">Open…</button></span>
        <input type="file" accept="audio/*,.wav,.flac,.mp3,.ogg,.m4a" data-is="file" hidden>
      </div>
      <div class="stage" data-is="stage" tabindex="0" role="application" aria-label="The clip in time. Drag over the waveform to choose a stretch, click a cell of the map to choose stretch and layer. Arrow keys move the stretch, with Shift they widen it, up and down choose a layer, Enter plays it, Space plays the clip, Escape stops and clears."><canvas></canvas></div>
      <div class="row legend">
        <span class="switch" data-is="parts" role="group" aria-label="Map of"></span>
        <label class="soft">each cell: <b data-is="tracked"></b> when <select data-is="by" aria-label="What the map puts in"></select> is put in there</label>
        <span class="grow"></span>
        <span data-is="progress" class="soft"></span>
        <span class="scale soft"><span data-is="low"></span><i></i><span data-is="high"></span></span>
      </div>
    </section>
    <section class="card tools" aria-label="The chosen stretch">
      <p data-is="hint" class="soft">Drag over the sound to choose a stretch of it, or click a cell of the map.</p>
      <div class="row" data-is="stretch" hidden>
        <span class="times"><input data-is="start" type="number" step="0.01" min="0" aria-label="From second"> – <input data-is="end" type="number" step="0.01" min="0" aria-label="to second"> s</span>
        <button data-is="hear" aria-label="Play the stretch">▶</button>
        <label>in <select data-is="level"></select></label>
        <span class="row"><span class="soft">put</span>
        <button data-is="put-silence" class="main">silence</button>
        <button data-is="put-noise" class="main">noise</button>
        <button data-is="put-other" class="main">the other clip</button></span>
      </div>
    </section>
  </div>
  <aside>
    <section class="card">
      <h2>It says</h2>
      <output class="said" data-is="said" aria-live="polite">…</output>
      <div data-is="answers" class="answers"></div>
      <p class="soft small" data-is="answer-note"></p>
    </section>
    <section class="card">
      <h2>Touches</h2>
      <ol data-is="touches" class="touches"></ol>
      <div class="row">
        <button data-is="undo" title="Ctrl+Z">↶ Undo</button><button data-is="redo" title="Ctrl+Shift+Z">↷ Redo</button><button data-is="clear">Clear</button>
      </div>
      <div class="row">
        <button data-is="code">Python</button><button data-is="save" title="Clips, question and touches, as a file that opens them again">Save…</button><button data-is="load">Open…</button>
        <input type="file" accept=".json,application/json" data-is="edits-file" hidden>
      </div>
    </section>
  </aside>
</div>
<section class="card" data-is="heads-card">
  <div class="row">
    <h2>Heads</h2>
    <select data-is="site" aria-label="Heads of"></select>
    <label class="soft">colour <select data-is="shade"><option value="change">what turning it off does</option><option value="audio">its attention on the clip</option></select></label>
  </div>
  <div class="heads">
    <div data-is="grid" class="grid" role="group" aria-label="Heads"></div>
    <div data-is="head" class="head"></div>
  </div>
</section>
<dialog data-is="dialog" aria-label="Python code">
  <div class="row"><h2 class="grow">The same in Python</h2><button data-is="copy" class="main">Copy</button><button data-is="close" aria-label="Close">✕</button></div>
  <pre data-is="text" tabindex="0"></pre>
</dialog>`;

const SOURCES = { other: "the other clip", silence: "silence", noise: "noise" };
const LEAST_S = 0.02;

function element(tag, attributes = {}, ...children) {
  const made = Object.assign(document.createElement(tag), attributes);
  made.append(...children);
  return made;
}

function percent(share) {
  if (share > 0 && share < 0.0001) return "< 0.01 %";
  return `${(100 * share).toFixed(share < 0.1 ? 2 : 1)} %`;
}

const signed = (change) => `${change < 0 ? "−" : "+"}${Math.abs(change).toFixed(1)}`;
const chance = (logOdds) => 1 / (1 + Math.exp(-logOdds));
const fromTo = (now, change) => `${percent(chance(now))} → ${percent(chance(now + change))}`;
const bare = (word) => word.replace(/^␣/, "");

function mount(root, link) {
  root.classList.add("ale");
  root.innerHTML = SKELETON;
  const $ = (name) => root.querySelector(`[data-is="${name}"]`);
  const state = {
    scene: null, sound: null, touches: [], answers: [], layers: [], part: null, by: null,
    token: null, map: null, limit: 1, selection: null, site: null, heads: null, headMap: null,
    head: null, other: null,
  };
  const player = new Player();
  const picture = new Picture(root.querySelector("canvas"), state);
  let session = "", turn = 0;
  player.onmove = (seconds) => {
    picture.cursor = player.isClip ? seconds : null;
    $("play").textContent = player.isPlaying ? "■ Stop" : "▶ Play";
    picture.draw();
  };

  // ---------------------------------------------------------------- messages and events

  // ask and show what comes back; `current` says whether it is still wanted
  async function ask(message, { content = null, current = () => true } = {}) {
    try {
      for await (const event of link.ask({ session, ...message }, content)) {
        if (!current()) return;
        shown[event.event]?.(event);
      }
    } catch (error) {
      if (current()) problem(`The explorer's server does not answer any more: start it again (${error.message}).`);
    }
  }

  // something that changes what the model is given or does
  async function change(message, content = null) {
    problem("");
    root.dataset.busy = Number(root.dataset.busy ?? 0) + 1;
    await ask(message, { content });
    root.dataset.busy = Number(root.dataset.busy) - 1;
  }

  // what follows from a change, while it is the last one
  function refresh() {
    const own = ++turn, current = () => own === turn;
    root.dataset.turn = own;
    askMap(current);
    ask({ do: "said" }, { current });
    if (!state.site) return;
    const head = state.head && { layer: state.head.layer, head: state.head.head };
    ask({ do: "heads", site: state.site, ...head }, { current });
    ask({ do: "head_map", site: state.site, token: state.token }, { current });
  }

  async function askMap(current) {
    if (!state.part) return;
    $("progress").textContent = "drawing the map";
    await ask({ do: "map", part: state.part, by: state.by, token: state.token }, { current });
  }

  const shown = {
    opened: (event) => { session = event.session; },
    scene: (scene) => {
      state.scene = scene;
      $("model").textContent = scene.model;
      $("question").value = scene.question;
      $("question-label").textContent = scene.is_asked ? "Question" : "Written so far";
      $("asking").hidden = !scene.takes_text;
      $("clip").textContent = scene.clip;
      $("other").textContent = scene.other ?? "none";
      for (const name of ["put-other", "hear-other"]) $(name).hidden = scene.other === null;
      const parts = Object.keys(scene.parts);
      state.part = parts.includes(state.part) ? state.part : parts.at(-1) ?? null;
      state.by = state.by && (state.by !== "other" || scene.other) ? state.by : scene.other ? "other" : "silence";
      const sites = scene.sites.map(({ site }) => site);
      state.site = sites.includes(state.site) ? state.site : sites[0] ?? null;
      state.map = state.heads = state.headMap = state.head = null;
      state.token = null;
      showChoices();
    },
    sound: (event) => {
      state.sound = soundOf(event);
      picture.heard();
      select(state.selection);
    },
    state: (event) => {
      Object.assign(state, { touches: event.touches, answers: event.answers });
      if (!event.answers.some(({ token }) => token === state.token)) state.token = event.answers[0].token;
      $("undo").disabled = !event.can_undo;
      $("redo").disabled = !event.can_redo;
      $("clear").disabled = !event.touches.length;
      $("answer-note").textContent = event.ms === null ? "Bars: now. Line: without touches. Click one to map it."
        : `Answered in ${event.ms.toFixed(0)} ms. Line: without touches. Click one to map it.`;
      $("said").classList.add("old");
      showAnswers();
      showTouches();
      showTools();
      picture.draw();
      refresh();
    },
    said: ({ text }) => {
      $("said").textContent = text.trim() || "(nothing)";
      $("said").classList.remove("old");
    },
    map: (map) => {
      state.map = map;
      const changes = map.change.flat().filter((x) => x !== null).map(Math.abs);
      state.limit = Math.max(0.5, ...changes);
      [$("low").textContent, $("high").textContent] = [signed(-state.limit), `${signed(state.limit)} log-odds`];
      root.dataset.cells = changes.length;
      const widths = map.spans.map(([start, end]) => end - start);
      $("progress").textContent = `refining: ${(1000 * Math.min(...widths)).toFixed(0)} ms`;
      picture.draw();
    },
    map_done: () => { $("progress").textContent = ""; root.dataset.drawn = turn; },
    heads: (heads) => { state.heads = heads; showHeads(); },
    head_map: (event) => { state.headMap = event; showHeads(); root.dataset.headed = turn; },
    head: (event) => {
      state.head = { ...event, edges: state.heads.edges };
      state.head.spans = attended(state.head.edges, event.share, 0.5);
      showHeads();
      picture.draw();
    },
    code: ({ text }) => { $("text").textContent = text; $("dialog").showModal(); },
    file: ({ written }) => {
      const address = URL.createObjectURL(new Blob([JSON.stringify(written)], { type: "application/json" }));
      element("a", { href: address, download: "edits.json" }).click();
      setTimeout(() => URL.revokeObjectURL(address), 10_000);
    },
    error: ({ message }) => problem(message),
  };

  function problem(message) {
    $("problem").textContent = message;
    $("problem").hidden = !message;
  }

  // ---------------------------------------------------------------- showing

  function options(select, pairs, chosen) {
    select.replaceChildren(...pairs.map(([value, text]) => element("option", { value, textContent: text, selected: value === chosen })));
  }

  function showChoices() {
    const { scene } = state, parts = Object.entries(scene.parts);
    $("parts").replaceChildren(...parts.map(([part]) => {
      const button = element("button", { textContent: part });
      button.addEventListener("click", () => { showPart(part); refresh(); });
      return button;
    }));
    showPart(state.part);
    const sources = Object.entries(SOURCES).filter(([by]) => by !== "other" || scene.other);
    options($("by"), sources, state.by);
    const levels = parts.flatMap(([part, count]) => [...Array(count).keys()].map((layer) => [`${part} ${layer}`, `${part} layer ${layer}`]));
    options($("level"), [["", "the sound"], ...levels], "");
    options($("site"), scene.sites.map(({ site }) => [site, site.replace(".attn", "").replace(".cross_attn", ", cross-attention")]), state.site);
    $("heads-card").hidden = !state.site;
  }

  const answerRows = new Map();
  function showAnswers() {
    const most = [...state.answers].sort((a, b) => Math.max(b.now, b.before) - Math.max(a.now, a.before)).slice(0, 7);
    $("tracked").textContent = `“${bare(state.answers.find(({ token }) => token === state.token).word)}”`;
    const rows = most.map((answer) => {
      if (!answerRows.has(answer.token)) answerRows.set(answer.token, answerRow(answer));
      const row = answerRows.get(answer.token);
      row.ariaPressed = answer.token === state.token;
      row.dataset.now = answer.now;
      const [word, bar, value] = row.children;
      word.textContent = bare(answer.word);
      bar.firstChild.style.width = `${100 * answer.now}%`;
      bar.lastChild.style.left = `${100 * answer.before}%`;
      value.textContent = percent(answer.now);
      row.title = `${answer.word}: ${answer.now} now, ${answer.before} without touches`;
      return row;
    });
    $("answers").replaceChildren(...rows);
  }

  function answerRow({ token }) {
    const row = element("button", { className: "answer" }, element("span", { className: "word" }),
      element("span", { className: "bar" }, element("i"), element("u")), element("span", { className: "value" }));
    row.dataset.token = token;
    row.addEventListener("click", () => { state.token = token; state.map = state.headMap = null; showAnswers(); picture.draw(); refresh(); });
    return row;
  }

  function showTouches() {
    const focused = $("touches").contains(document.activeElement) ? document.activeElement.dataset.at : undefined;
    $("touches").replaceChildren(...state.touches.map((touch, at) => {
      const off = element("button", { textContent: "✕", ariaLabel: `Take off: ${touch.label}`, className: "off" });
      off.addEventListener("click", () => change({ do: "drop", at }));
      const item = element("li", {}, element("span", { textContent: touch.label }), off);
      if (touch.kind === "head") item.append(slider(touch, at));
      return item;
    }));
    if (focused !== undefined) $("touches").querySelector(`[data-at="${focused}"]`)?.focus();
    if (!state.touches.length) $("touches").append(element("li", { className: "soft none", textContent: "None yet: this is the model as it is." }));
  }

  // how much of what a head gives is left; while it is dragged, the last value counts
  function slider({ label, ...touch }, at) {
    const input = element("input", { type: "range", min: 0, max: 2, step: 0.05, value: touch.g, ariaLabel: `How much of ${label}` });
    input.dataset.at = at;
    input.addEventListener("change", () => change({ do: "touch", touch: { ...touch, g: Number(input.value) }, at }));
    return input;
  }

  function showTools() {
    const { selection } = state;
    $("hint").hidden = selection !== null;
    $("stretch").hidden = selection === null;
    if (!selection) return;
    if (document.activeElement !== $("start")) $("start").value = selection.start.toFixed(2);
    if (document.activeElement !== $("end")) $("end").value = selection.end.toFixed(2);
    $("level").value = selection.layer === null ? "" : `${selection.part} ${selection.layer}`;
  }

  function showHeads() {
    const { heads, headMap } = state, { site } = state;
    if (!heads || heads.site !== site) return;
    const isChange = $("shade").value === "change";
    const change = headMap?.site === site ? headMap.change : null;
    const most = change ? Math.max(0.1, ...change.flat().map(Math.abs)) : 1;
    const rows = [...heads.layers.keys()].reverse().flatMap((l) => [
      element("span", { className: "soft small", textContent: `layer ${heads.layers[l]}` }),
      ...heads.heads.map((head, h) => headButton(l, h, isChange ? change && change[l][h] / most : heads.on_audio[l][h])),
    ]);
    $("grid").style.setProperty("--heads", heads.heads.length);
    const focused = $("grid").contains(document.activeElement) ? document.activeElement.dataset.at : undefined;
    $("grid").replaceChildren(...rows);
    if (focused !== undefined) $("grid").querySelector(`[data-at="${focused}"]`)?.focus();
    showHead(change);
  }

  function headButton(l, h, value) {
    const { heads, head } = state;
    const [layer, number] = [heads.layers[l], heads.heads[h]];
    const isOff = state.touches.some((t) => t.kind !== "stretch" && t.site === state.site && t.layer === layer && t.head === number);
    const button = element("button", {
      className: isOff ? "cell touched" : "cell", ariaLabel: `layer ${layer}, head ${number}`,
      title: `head ${layer}.${number}: ${percent(heads.on_audio[l][h])} of its attention on the clip, most at ${heads.peak_s[l][h]} s`,
      ariaPressed: head?.layer === layer && head?.head === number,
    });
    button.dataset.at = `${layer}.${number}`;
    if (value !== null) {
      button.style.setProperty("--share", Math.min(1, Math.abs(value)) ** 0.7);
      button.style.setProperty("--hue", `var(--${$("shade").value === "audio" ? "accent" : value < 0 ? "fall" : "rise"})`);
    }
    button.addEventListener("click", () => ask({ do: "head", site: state.site, layer, head: number }));
    return button;
  }

  function showHead(change) {
    const { head, heads, site } = state, panel = $("head");
    if (!head || head.site !== site) {
      panel.replaceChildren(element("p", { className: "soft", textContent: "Click a head: see above what it attends to, hear it, and take it away." }));
      return;
    }
    const { layer, head: number } = head, at = { site, layer, head: number };
    const [l, h] = [heads.layers.indexOf(layer), heads.heads.indexOf(number)];
    const word = bare(state.answers.find(({ token }) => token === state.token).word);
    const facts = [`${percent(head.on_audio)} of its attention is on the clip (${heads.asker}).`];
    if (change) facts.push(`Turned off, “${word}” goes ${fromTo(state.headMap.now, change[l][h])}.`);
    const row = (...buttons) => element("div", { className: "row" }, ...buttons);
    const button = (name, text, act, isMain = false) => {
      const made = element("button", { textContent: text, className: isMain ? "main" : "" });
      made.dataset.is = name;
      made.addEventListener("click", act);
      return made;
    };
    panel.replaceChildren(
      element("h3", { textContent: `${site.replace(".attn", "").replace(".cross_attn", " cross")} head ${layer}.${number}` }),
      element("p", { className: "soft", textContent: facts.join(" ") }),
      row(button("hear-context", "▶ What it attends to, in context", () => hearHead(false)), button("hear-cut", "▶ cut out", () => hearHead(true))),
      row(
        button("turn-off", "Turn off", () => touch({ kind: "head", ...at, g: 0 }), true),
        button("halve", "Halve", () => touch({ kind: "head", ...at, g: 0.5 })),
        button("double", "Double", () => touch({ kind: "head", ...at, g: 2 })),
        button("deafen", "Deafen to the audio", () => touch({ kind: "deafened", ...at }), true),
        button("deafen-stretch", "Deafen to the stretch", () => {
          if (!state.selection) return problem("Choose a stretch first: drag over the sound.");
          touch({ kind: "deafened", ...at, start_s: state.selection.start, end_s: state.selection.end });
        }),
      ),
    );
  }
  const touch = (made) => change({ do: "touch", touch: made });

  // ---------------------------------------------------------------- sound

  function play(sound, start, end, isClip = true) {
    player.isClip = isClip;
    return player.play(sound, start, end);
  }

  function hearHead(isCut) {
    const lit = litUp(state.sound, state.head.spans, isCut);
    if (isCut) return play(lit, 0, Infinity, false);
    const [first, last] = [state.head.spans[0][0], state.head.spans.at(-1)[1]];
    return play(lit, Math.max(0, first - 0.4), last + 0.4);
  }

  // ---------------------------------------------------------------- the stretch

  function select(selection) {
    const most = state.sound?.seconds ?? Infinity;
    if (selection) {
      const [start, end] = [Math.max(0, selection.start), Math.min(most, selection.end)];
      selection = end - start >= LEAST_S ? { ...selection, start: round(start), end: round(end) } : null;
    }
    state.selection = selection;
    root.dataset.stretch = selection ? `${selection.start} ${selection.end}` : "";
    showTools();
    picture.draw();
  }
  const round = (seconds) => Math.round(seconds * 1000) / 1000;

  function put(by) {
    const { start, end, part, layer } = state.selection;
    const at = layer === null ? { part: null, layer: null } : { part, layer };
    touch({ kind: "stretch", start_s: start, end_s: end, by, ...at });
  }

  const stage = $("stage");
  let dragged = null; // {from, lane, row, moved}
  const place = (event) => {
    const box = stage.firstChild.getBoundingClientRect();
    return [event.clientX - box.left, event.clientY - box.top];
  };
  stage.addEventListener("pointerdown", (event) => {
    if (event.button !== 0 || !state.sound) return;
    const [x, y] = place(event), { lane, row } = picture.at(x, y);
    if (!lane) return;
    dragged = { x, from: picture.seconds(x), lane, row, moved: false };
    stage.setPointerCapture(event.pointerId);
  });
  stage.addEventListener("pointermove", (event) => {
    if (!dragged) return hover(event);
    const [x] = place(event);
    if (Math.abs(x - dragged.x) > 3) dragged.moved = true;
    if (!dragged.moved) return;
    const at = picture.seconds(x);
    const isMap = dragged.lane === "map";
    const level = isMap ? { part: state.part, layer: dragged.row } : { part: null, layer: null };
    select({ start: Math.min(at, dragged.from), end: Math.max(at, dragged.from), ...level });
  });
  stage.addEventListener("pointerup", () => {
    const was = dragged;
    dragged = null;
    if (!was || was.moved) return;
    if (was.lane === "map") clickCell(was);
    else if (was.lane === "head") hearHead(false);
    else if (was.lane === "words") clickWord(was);
    else { select(null); play(state.sound, was.from); }
  });
  stage.addEventListener("pointercancel", () => { dragged = null; });
  stage.addEventListener("dblclick", () => { if (state.selection) hear(); });

  function clickCell({ from, row }) {
    const cell = picture.cell(from);
    if (cell < 0) return;
    const [start, end] = state.map.spans[cell];
    select({ start, end: Math.min(end, state.sound.seconds), part: state.part, layer: row });
  }

  function clickWord({ from }) {
    const word = state.sound.words.find(([start, end]) => from >= start && from <= end);
    if (word) select({ start: word[0], end: word[1], part: null, layer: null });
  }

  function hover(event) {
    const { lane, row } = picture.at(...place(event));
    const cell = lane === "map" ? picture.cell(picture.seconds(place(event)[0])) : -1;
    const change = cell < 0 ? null : state.map.change[row]?.[cell] ?? null;
    stage.style.cursor = lane === "map" || lane === "head" || lane === "words" ? "pointer" : "text";
    stage.title = change === null ? "" : `${state.part} layer ${row}, ${state.map.spans[cell].map((s) => s.toFixed(2)).join("–")} s: ${fromTo(state.map.now, change)}`;
  }

  function hear() { play(state.sound, state.selection.start, state.selection.end); }

  function toggle() { player.isPlaying ? player.stop() : play(state.sound); }

  stage.addEventListener("keydown", (event) => {
    const { selection } = state, isWider = event.shiftKey;
    const now = selection ?? { start: 0, end: 0.2, part: null, layer: null };
    const step = { ArrowLeft: -0.05, ArrowRight: 0.05 }[event.key];
    const climb = { ArrowUp: 1, ArrowDown: -1 }[event.key];
    if (event.key === " ") toggle();
    else if (event.key === "Escape") { player.stop(); select(null); }
    else if (event.key === "Enter" && selection) hear();
    else if (step !== undefined) select({ ...now, start: isWider ? now.start : now.start + step, end: now.end + step });
    else if (climb !== undefined && state.part) {
      const layer = (now.layer ?? -1) + climb;
      const level = layer < 0 ? { part: null, layer: null } : { part: state.part, layer: Math.min(layer, state.layers.length - 1) };
      select({ ...now, ...level });
    } else return;
    event.preventDefault();
  });

  // ---------------------------------------------------------------- clips

  let which = "clip";
  async function take(name, bytes, into) {
    const message = { do: "clip", which: into, name };
    problem("");
    root.dataset.busy = Number(root.dataset.busy ?? 0) + 1;
    const isWav = /\.(wav|flac|ogg|mp3|aiff?)$/i.test(name);
    try {
      // what Python does not read, the browser may
      const samples = isWav ? null : await player.decoded(bytes.slice(0), state.sound.rate);
      const content = samples ? wavOf(samples, state.sound.rate) : bytes;
      await ask({ ...message, session, name: samples ? name.replace(/\.[^.]*$|$/, ".wav") : name }, { content });
    } catch (error) {
      problem(`${name} cannot be read as audio (${error.message}).`);
    }
    root.dataset.busy = Number(root.dataset.busy) - 1;
  }

  function choose(into) { which = into; $("file").click(); }
  $("open").addEventListener("click", () => choose("clip"));
  $("open-other").addEventListener("click", () => choose("other"));
  $("file").addEventListener("change", async (event) => {
    const [file] = event.target.files;
    if (file) await take(file.name, await file.arrayBuffer(), which);
    event.target.value = "";
  });
  root.addEventListener("dragover", (event) => { event.preventDefault(); $("drop").classList.add("over"); });
  root.addEventListener("dragleave", () => $("drop").classList.remove("over"));
  root.addEventListener("drop", async (event) => {
    event.preventDefault();
    $("drop").classList.remove("over");
    const [file] = event.dataTransfer.files;
    if (!file) return;
    if (/\.json$/i.test(file.name)) return load(file);
    await take(file.name, await file.arrayBuffer(), "clip");
  });

  let recorder = null;
  $("record").addEventListener("click", async () => {
    if (recorder) return recorder.stop();
    try {
      const stream = await navigator.mediaDevices.getUserMedia({ audio: true });
      const pieces = [];
      recorder = new MediaRecorder(stream);
      recorder.ondataavailable = ({ data }) => pieces.push(data);
      recorder.onstop = async () => {
        recorder = null;
        stream.getTracks().forEach((track) => track.stop());
        $("record").textContent = "● Record";
        await take("recording.webm", await new Blob(pieces).arrayBuffer(), "clip");
      };
      recorder.start();
      $("record").textContent = "■ Stop recording";
    } catch (error) {
      recorder = null;
      problem(`The microphone cannot be used (${error.message}).`);
    }
  });

  async function load(file) {
    try {
      await change({ do: "load", written: JSON.parse(await file.text()) });
    } catch (error) {
      problem(`${file.name} holds no edits (${error.message}).`);
    }
  }
  $("load").addEventListener("click", () => $("edits-file").click());
  $("edits-file").addEventListener("change", async (event) => {
    const [file] = event.target.files;
    if (file) await load(file);
    event.target.value = "";
  });

  // ---------------------------------------------------------------- buttons

  $("play").addEventListener("click", toggle);
  $("hear").addEventListener("click", hear);
  for (const by of Object.keys(SOURCES)) $(`put-${by}`).addEventListener("click", () => put(by));
  for (const name of ["undo", "redo", "clear"]) $(name).addEventListener("click", () => change({ do: name }));
  $("code").addEventListener("click", () => ask({ do: "code" }));
  $("save").addEventListener("click", () => ask({ do: "save" }));
  $("close").addEventListener("click", () => $("dialog").close());
  $("copy").addEventListener("click", async () => {
    try {
      await navigator.clipboard.writeText($("text").textContent);
      $("copy").textContent = "Copied";
    } catch {
      getSelection().selectAllChildren($("text"));
      $("copy").textContent = "Chosen: press Ctrl+C";
    }
    setTimeout(() => { $("copy").textContent = "Copy"; }, 1500);
  });
  $("asking").addEventListener("submit", (event) => {
    event.preventDefault();
    change({ do: "ask", question: $("question").value });
  });
  $("by").addEventListener("change", () => { state.by = $("by").value; state.map = null; picture.draw(); refresh(); });
  $("shade").addEventListener("change", showHeads);
  $("site").addEventListener("change", () => {
    Object.assign(state, { site: $("site").value, heads: null, headMap: null, head: null });
    picture.draw();
    refresh();
  });
  $("level").addEventListener("change", () => {
    const [part, layer] = $("level").value.split(" ");
    if (part && part !== state.part) { showPart(part); refresh(); }
    select({ ...state.selection, part: part || null, layer: part ? Number(layer) : null });
  });
  for (const name of ["start", "end"]) {
    $(name).addEventListener("change", () => select({ ...state.selection, [name]: Number($(name).value) }));
  }
  $("hear-other").addEventListener("click", () => ask({ do: "other" }));
  shown.other = (event) => play(soundOf(event), 0, Infinity, false);

  // draw the map of a part, or none
  function showPart(part) {
    Object.assign(state, { part, map: null, layers: [...Array(state.scene.parts[part] ?? 0).keys()] });
    [...$("parts").children].forEach((button) => { button.ariaPressed = button.textContent === part; });
    picture.draw();
  }

  const onKey = (event) => {
    const isUndo = (event.ctrlKey || event.metaKey) && event.key.toLowerCase() === "z";
    if (!isUndo || event.target.matches("input, textarea")) return;
    event.preventDefault();
    change({ do: event.shiftKey ? "redo" : "undo" });
  };
  root.addEventListener("keydown", onKey);
  change({ do: "open" }).then(() => { root.dataset.ready = "true"; });
  return () => player.stop();
}
