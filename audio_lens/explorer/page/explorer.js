// The explorer: what is touched goes to Python as messages, what comes back is shown.
// `link.ask(message, content)` gives the events that answer a message.

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
  const change = (message) => busy(() => ask(message));
  const touch = (made) => change({ do: "touch", touch: made });

  async function busy(work) {
    problem("");
    root.dataset.busy = Number(root.dataset.busy ?? 0) + 1;
    await work();
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

  wireClips(root, $, state, { ask, change, busy, player, problem });
  const showHeads = headPanel($, state, { ask, touch, hear: hearHead, problem });

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
