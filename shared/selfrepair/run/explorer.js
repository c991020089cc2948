"use strict";
(() => {
  const held = (id) => JSON.parse(document.getElementById(id).textContent);
  const { heads, tokens, tokensOf } = held("explorer-data");
  const [chart, split] = held("explorer-charts");
  const [kind, model, head] = ["explorer-kind", "explorer-model", "explorer-head"].map((id) => document.getElementById(id));
  const number = (value) => (value === null ? "–" : (Math.round(value * 1000) / 1000).toFixed(3));
  const drawn = { mode: "vega-lite", renderer: "svg", actions: false, defaultStyle: false, ast: true, tooltip: { disableDefaultStyle: true } };
  const views = {};

  const add = (parent, tag, text, className) => {
    const made = parent.appendChild(document.createElement(tag));
    made.textContent = text ?? "";
    if (className) made.className = className;
    return made;
  };
  const shown = () => heads.filter((one) => one.ablation === kind.value && (model.value === "" || one.model === model.value));

  // Red: made worse; blue: repaired. As strong as 95% of the values of what is shown.
  const colour = (value, limit) => {
    const strength = Math.min(1, Math.abs(value) / limit);
    return `rgb(${value < 0 ? "214 96 77" : "67 147 195"} / ${(0.85 * strength).toFixed(2)})`;
  };

  const showTokens = (found) => {
    const box = document.getElementById("explorer-tokens");
    box.replaceChildren();
    const passages = tokens?.[found.model]?.[`L${found.layer}H${found.head}`] ?? [];
    if (!passages.length) return;
    add(box, "h4", `Where it writes most: self-repair (${tokensOf} ablation) of each token`);
    const sizes = passages.flatMap((one) => one.tokens.map(([, , repair]) => Math.abs(repair ?? 0))).sort((a, b) => a - b);
    const limit = sizes[Math.floor(0.95 * (sizes.length - 1))] || 1;
    for (const passage of passages) {
      const line = add(box, "p", "", "passage");
      passage.tokens.forEach(([text, effect, repair], place) => {
        const token = add(line, place === passage.marked ? "mark" : "span", text.replaceAll("\n", "↵"));
        if (repair === null) return;
        token.style.backgroundColor = colour(repair, limit);
        token.title = `direct effect ${effect}, self-repair ${repair} (logits)`;
      });
      const [, effect, repair] = passage.tokens[passage.marked];
      add(line, "small", ` prompt ${passage.prompt}; framed token: direct effect ${effect}, self-repair ${repair}`);
    }
  };

  const show = (id) => {
    const found = heads.find((one) => one.id === id && one.ablation === kind.value);
    document.getElementById("explorer-detail").hidden = !found;
    head.value = found ? id : "";
    views.chart.signal("picked", found ? id : "").run();
    if (!found) return;
    document.getElementById("explorer-name").textContent = `${found.model}, L${found.layer}H${found.head}, ${found.ablation} ablation`;
    document.getElementById("explorer-numbers").textContent =
      `Direct effect ${number(found.direct_effect)}, logit change ${number(found.logit_change)}, self-repair ${number(found.self_repair)} logits, ` +
      `which is the sum of these parts:`;
    const parts = { "final norm": found.layernorm, "other heads": found.heads, MLPs: found.mlps };
    dispatchEvent(new Event("resize")); // a chart that was hidden does not know how wide it is
    views.split.data("split", Object.entries(parts).map(([part, value]) => ({ part, value }))).run();
    showTokens(found);
  };

  const fill = () => {
    const before = head.value;
    head.replaceChildren(new Option("choose a head", ""), ...shown().map((one) => new Option(`${one.model} L${one.layer}H${one.head}`, one.id)));
    views.chart.signal("kind", kind.value).signal("only", model.value).run();
    show(shown().some((one) => one.id === before) ? before : "");
  };

  Promise.all([vegaEmbed("#explorer-chart", chart, drawn), vegaEmbed("#explorer-split", split, drawn)]).then(([one, other]) => {
    Object.assign(views, { chart: one.view, split: other.view });
    one.view.addEventListener("click", (_, item) => item?.datum?.id && show(item.datum.id));
    kind.addEventListener("change", fill);
    model.addEventListener("change", fill);
    head.addEventListener("change", () => show(head.value));
    fill();
    document.getElementById("explorer").dataset.ready = "yes";
  });
})();
