"use strict";
// What a reader chose stays chosen when the page shows itself anew; a browser may forbid to keep it.
const kept = (name) => `flowtilt:${location.pathname}:${name}`;
const remembered = (name) => {
  try {
    return sessionStorage.getItem(kept(name));
  } catch {
    return null;
  }
};
const remember = (name, value) => {
  try {
    sessionStorage.setItem(kept(name), value);
  } catch {
    /* then it is chosen again */
  }
};

// Read-outs on hovering; the page says the same without them in its captions and tables.
for (const plot of document.querySelectorAll(".plot[data-read]")) {
  let points = JSON.parse(plot.dataset.read);
  if (!points.length) continue;
  const tip = document.createElement("div"), dot = document.createElement("div");
  tip.className = "tip";
  dot.className = "spot";
  tip.hidden = dot.hidden = true;
  plot.append(dot, tip);
  plot.addEventListener("pointermove", (event) => {
    const box = plot.getBoundingClientRect();
    const dx = (p) => (p[0] / 100) * box.width - (event.clientX - box.left);
    const dy = (p) => ("several" in plot.dataset ? (p[1] / 100) * box.height - (event.clientY - box.top) : 0);
    const away = (p) => Math.hypot(dx(p), dy(p));
    const [x, y, text] = points.reduce((best, p) => (away(p) < away(best) ? p : best));
    tip.hidden = dot.hidden = false;
    tip.textContent = text;
    dot.style.left = x + "%";
    dot.style.top = y + "%";
    const left = (x / 100) * box.width - tip.offsetWidth / 2;
    tip.style.left = Math.max(0, Math.min(box.width - tip.offsetWidth, left)) + "px";
    tip.style.top = y > 30 ? `calc(${y}% - 34px)` : `calc(${y}% + 12px)`;
  });
  plot.addEventListener("rescaled", (event) => {
    points = JSON.parse(plot.dataset.read).map(([x, y, text]) => [event.detail(x), y, text]);
  });
  plot.addEventListener("pointerleave", () => (tip.hidden = dot.hidden = true));
}

// What curves stand on: they are drawn against rollouts, and moved here to where time or work had got by then.
const choice = document.querySelector(".axis-choice");
if (choice) {
  const axes = JSON.parse(choice.dataset.axes), drawn = new Map();
  const place = (knots, x) => {
    const k = Math.max(1, knots.findIndex((knot) => knot[0] >= x));
    const [[x0, y0], [x1, y1]] = [knots[k - 1], knots[k] || knots[k - 1]];
    return x1 > x0 ? y0 + ((y1 - y0) * (x - x0)) / (x1 - x0) : y1;
  };
  const tick = (x, anchor, text) => {
    const found = document.createElementNS(document.querySelector("svg").namespaceURI, "text");
    for (const [name, value] of Object.entries({ class: "tick", x, y: "100%", dy: 18, "text-anchor": anchor })) found.setAttribute(name, value);
    found.textContent = text;
    return found;
  };
  const change = (axis) => {
    const at = (x) => place(axis.knots, x);
    for (const plot of document.querySelectorAll(".plot[data-clock]")) {
      for (const part of plot.querySelectorAll("circle, .mark line, path")) {
        if (!drawn.has(part)) drawn.set(part, ["cx", "x1", "x2", "d"].map((name) => [name, part.getAttribute(name)]));
        for (const [name, value] of drawn.get(part)) {
          if (value === null) continue;
          const moved = name === "d" ? value.replace(/(-?[\d.]+) (-?[\d.]+)/g, (_, x, y) => `${(10 * at(x / 10)).toFixed(1)} ${y}`) : `${at(parseFloat(value))}%`;
          part.setAttribute(name, moved);
        }
      }
      const ticks = axis[plot.dataset.clock].map(([x, label]) => tick(`${x}%`, "middle", label));
      plot.querySelector(".x-ticks").replaceChildren(...(axis.unit ? [tick(-10, "end", axis.unit)] : []), ...ticks);
      plot.dispatchEvent(new CustomEvent("rescaled", { detail: at }));
    }
  };
  const chosen = Math.max(0, axes.findIndex((axis) => axis.name === remembered("axis")));
  axes.forEach((axis, number) => {
    const label = document.createElement("label"), input = document.createElement("input");
    Object.assign(input, { type: "radio", name: "stands-on", checked: number === chosen });
    input.addEventListener("change", () => {
      change(axis);
      remember("axis", axis.name);
    });
    label.append(input, axis.name);
    choice.append(label);
  });
  choice.hidden = false;
  if (chosen) change(axes[chosen]);
}
for (const box of document.querySelectorAll(".scroll")) {
  const hint = document.createElement("p");
  hint.className = "scroll-hint";
  hint.textContent = "Scroll the table sideways for more columns.";
  box.before(hint);
  const show = () => (hint.hidden = box.scrollWidth <= box.clientWidth + 1);
  new ResizeObserver(show).observe(box);
}

// Tabs and what is folded out, by their place in the page.
const opened = () => [...document.querySelectorAll("details")].map((one) => (one.open ? 1 : 0)).join("");
[...(remembered("open") || "")].forEach((one, k) => {
  const found = document.querySelectorAll("details")[k];
  if (found) found.open = one === "1";
});
for (const one of document.querySelectorAll("details")) one.addEventListener("toggle", () => remember("open", opened()));
const tab = document.getElementById(remembered("tab"));
if (tab && tab.type === "radio") tab.checked = true;
for (const one of document.querySelectorAll(".tabs > input")) one.addEventListener("change", () => remember("tab", one.id));

// A run that goes on. Its page says how old it is, and shows itself anew: from a disk every so often, from a server when there is more.
const live = document.querySelector("main").dataset;
const news = document.querySelector(".news");
if (news && live.touched) {
  const say = () => {
    const age = Math.max(0, Date.now() / 1000 - Number(live.touched)), longest = Math.max(300, 10 * Number(live.every || 0));
    const ago = age < 100 ? `${Math.round(age)} s` : age < 6000 ? `${Math.round(age / 60)} min` : `${Math.round(age / 3600)} h`;
    const doubt = age > longest ? ": if this is no long evaluation, the run was killed" : "";
    news.textContent = `· last news ${ago} ago${doubt}`;
    news.classList.toggle("late", age > longest);
  };
  say();
  setInterval(say, 1000);
}
const reload = () => {
  if (!document.hidden && !String(getSelection())) location.reload();
};
if (live.version) {
  const ask = async () => {
    try {
      const answer = await fetch("version", { cache: "no-store" });
      if (answer.ok && (await answer.text()) !== live.version) reload();
      document.body.classList.remove("gone");
    } catch {
      document.body.classList.add("gone");
    }
  };
  setInterval(ask, 2000);
} else if (live.every) setInterval(reload, 1000 * Number(live.every));
