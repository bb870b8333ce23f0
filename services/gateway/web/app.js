// Which view is shown, with which key, dark or light.
import { $, notice } from "./page.js";
import { json, keep, key } from "./api.js";
import * as fleet from "./fleet.js";
import * as playground from "./playground.js";
import * as requests from "./requests.js";
import * as usage from "./usage.js";

const VIEWS = ["fleet", "playground", "requests", "usage"], THEME = "tokenloom.theme";

function route() {
  const [view, ...rest] = location.hash.replace(/^#\/?/, "").split("/"), shown = VIEWS.includes(view) ? view : "fleet";
  for (const name of VIEWS) $(name).hidden = name !== shown;
  for (const link of document.querySelectorAll("nav a")) {
    if (link.hash === `#/${shown}`) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
  document.title = `tokenloom – ${shown}`;
  if (!key()) return;
  if (shown === "playground") playground.models().catch(error => linked(error.message));
  if (shown === "usage") usage.show();
  if (shown === "requests") {
    const id = rest.length ? decoded(rest.join("/")) : "";
    if (id) requests.show(id);
    else $("story").hidden = true;
    requests.latest();
  }
}

function decoded(text) {
  try { return decodeURIComponent(text); } catch { return text; }
}

function linked(said) {
  $("link").textContent = said ? "not connected" : "live";
  $("link").title = said;
  $("link").className = `link ${said ? "bad" : "good"}`;
}

function begin() {
  if (!key()) {
    notice($("fleet-notice"), "Enter an API key to begin.");
    askForKey();
  } else if (!document.hidden) {
    fleet.start(linked);
  }
  route();
}

function askForKey() {
  notice($("key-notice"), "");
  $("key-text").value = key();
  if (!$("key-dialog").open) $("key-dialog").showModal();
}

async function useKey(event) {
  event.preventDefault();
  const before = key();
  keep($("key-text").value.trim());
  try {
    await json("/v1/models");
    $("key-dialog").close();
    // What another key has shown is not for this one.
    if (before && before !== key()) location.reload();
    else begin();
  } catch (error) {
    keep(before);
    notice($("key-notice"), error.status === 401 ? "This key is not known." : error.message);
  }
}

function theme(next) {
  if (next) {
    const dark = getComputedStyle(document.documentElement).colorScheme;
    const now = dark === "dark" || (dark !== "light" && matchMedia("(prefers-color-scheme: dark)").matches) ? "dark" : "light";
    localStorage.setItem(THEME, now === "dark" ? "light" : "dark");
  }
  const kept = localStorage.getItem(THEME);
  if (kept) document.documentElement.dataset.theme = kept;
}

function pressed(event) {
  if (event.ctrlKey || event.metaKey || event.altKey || $("key-dialog").open || event.target.closest("input, textarea, select")) return;
  const view = VIEWS[event.key - 1];
  if (view) { location.hash = `#/${view}`; $("main").focus(); } else if (event.key === "k") { event.preventDefault(); askForKey(); } else if (event.key === "t") theme(true);
}

theme(false);
playground.wire();
requests.wire();
usage.wire();
$("theme").addEventListener("click", () => theme(true));
$("key").addEventListener("click", askForKey);
$("key-form").addEventListener("submit", useKey);
$("key-forget").addEventListener("click", () => { keep(""); location.reload(); });
addEventListener("hashchange", route);
addEventListener("keydown", pressed);
// A tab that nobody looks at needs no watch.
document.addEventListener("visibilitychange", () => { if (document.hidden) fleet.end(); else if (key()) fleet.start(linked); });
begin();
