// Making and changing what is on the page. Everything that comes from elsewhere becomes text, never markup.

export const $ = id => document.getElementById(id);

/** An element: its class, what is in it (text or elements), and further attributes. */
export function h(tag, className = "", inside = [], attributes = {}) {
  const made = document.createElement(tag);
  if (className) made.className = className;
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.append(...[inside].flat().map(one => one instanceof Node ? one : String(one ?? "")));
  return made;
}

/** Rows of a table by key: those that are there change in place, so that nothing jumps. */
export function fill(body, rows) {
  const old = new Map([...body.rows].map(row => [row.dataset.key, row]));
  rows.forEach(({ key, cells, className = "", link }, place) => {
    let row = old.get(key);
    old.delete(key);
    if (!row || row.cells.length !== cells.length) {
      row?.remove();
      row = h("tr");
      row.dataset.key = key;
      cells.forEach(() => row.append(h("td")));
    }
    row.className = className + (link ? " link-row" : "");
    if (link) {
      row.onclick = event => { if (!event.target.closest("a")) location.hash = link; };
    }
    cells.forEach((cell, index) => put(row.cells[index], cell));
    if (body.rows[place] !== row) body.insertBefore(row, body.rows[place] ?? null);
  });
  for (const row of old.values()) row.remove();
}

function put(place, cell) {
  const { text, node, className = "" } = typeof cell === "object" && cell !== null && !(cell instanceof Node)
    ? cell : cell instanceof Node ? { node: cell } : { text: cell };
  if (place.className !== className) place.className = className;
  if (node) place.replaceChildren(node);
  else if (place.textContent !== String(text ?? "")) place.textContent = text ?? "";
}

/** A bar with its value in words; `share` from 0 to 1. `fine`: being full is nothing to worry about. */
export function meter(share, text, label, fine = false) {
  const bar = h("i"), full = Math.max(0, Math.min(1, share || 0));
  bar.style.width = `${100 * full}%`;
  return h("div", "meter" + (full >= .9 && !fine ? " high" : ""), [h("i", "", bar), text], {
    role: "meter", "aria-label": label, "aria-valuemin": 0, "aria-valuemax": 100, "aria-valuenow": Math.round(100 * full),
  });
}

export const pill = (text, kind) => h("span", `pill ${kind}`, text);
export const number = text => ({ text, className: "n" });

/** A line of the latest values. */
export function spark(values) {
  const space = "http://www.w3.org/2000/svg", picture = document.createElementNS(space, "svg");
  const line = document.createElementNS(space, "polyline"), top = Math.max(...values, 1e-9), last = Math.max(values.length - 1, 1);
  picture.setAttribute("viewBox", "0 0 100 26");
  picture.setAttribute("preserveAspectRatio", "none");
  picture.setAttribute("aria-hidden", "true");
  line.setAttribute("points", values.map((value, at) => `${100 * at / last},${25 - 23 * value / top}`).join(" "));
  picture.append(line);
  return picture;
}

export function notice(place, text) {
  place.hidden = !text;
  place.textContent = text || "";
}

/** Seconds for people. */
export function time(seconds) {
  if (seconds === null || seconds === undefined || Number.isNaN(seconds)) return "–";
  if (seconds >= 60) return `${Math.floor(seconds / 60)} min ${Math.round(seconds % 60)} s`;
  return seconds >= 1 ? `${seconds.toFixed(2)} s` : `${(1000 * seconds).toFixed(seconds >= .1 ? 0 : 1)} ms`;
}

/** A proto's duration, "1.5s", in seconds. */
export const seconds = text => text === undefined || text === null ? 0 : parseFloat(text);
export const round = (value, digits = 0) => (+value || 0).toLocaleString("en", { maximumFractionDigits: digits });
export const share = value => `${Math.round(100 * (value || 0))} %`;
export const gib = bytes => (bytes / 2 ** 30).toFixed(1);
