// Clips and files of edits that are opened, dropped or recorded.
// `ask` and `change` go to Python, `busy(work)` says that the answer is about to change.

const IS_READ = /\.(wav|flac|ogg|mp3|aiff?)$/i; // by Python; the rest is left to the browser

function wireClips(root, $, state, { ask, change, busy, player, problem }) {
  let which = "clip";
  const take = (name, bytes, into) => busy(async () => {
    if (IS_READ.test(name)) return ask({ do: "clip", which: into, name }, { content: bytes });
    try {
      const samples = await player.decoded(bytes, state.sound.rate);
      const message = { do: "clip", which: into, name: name.replace(/\.[^.]*$|$/, ".wav") };
      return ask(message, { content: wavOf(samples, state.sound.rate) });
    } catch (error) {
      return problem(`${name} cannot be read as audio (${error.message}).`);
    }
  });

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
}
