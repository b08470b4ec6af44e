// What the explorer is made of before anything is known, and small helpers.

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
