// The heads of a site: a grid coloured by what they do, and what can be done to the chosen one.
// `ask` and `touch` go to Python, `hear(isCut)` plays what the chosen head attends to.

function headPanel($, state, { ask, touch, hear, problem }) {
  function show() {
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
    showOne(change);
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

  function showOne(change) {
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
      row(button("hear-context", "▶ What it attends to, in context", () => hear(false)), button("hear-cut", "▶ cut out", () => hear(true))),
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

  return show;
}
