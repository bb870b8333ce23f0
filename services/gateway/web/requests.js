// Where a request's time went, and why it went where it went.
import { $, fill, h, notice, number, pill, round, seconds, time } from "./page.js";
import { json } from "./api.js";
import { slow } from "./fleet.js";

const tokens = count => `${round(count)} token${count === 1 ? "" : "s"}`;
const wait = ms => new Promise(done => setTimeout(done, ms));

export function wire() {
  $("find").addEventListener("submit", event => {
    event.preventDefault();
    const id = $("request-id").value.trim();
    if (!id) latest();
    else if (location.hash === `#/requests/${encodeURIComponent(id)}`) show(id);
    else location.hash = `#/requests/${encodeURIComponent(id)}`;
  });
  $("list").addEventListener("click", latest);
}

export async function latest() {
  const query = new URLSearchParams({ limit: 50 });
  for (const name of ["tenant", "worker", "outcome"]) if ($(`by-${name}`).value.trim()) query.set(name, $(`by-${name}`).value.trim());
  try {
    const { data } = await json(`/v1/admin/requests?${query}`);
    notice($("requests-notice"), data.length ? "" : "No request of this kind has ended yet.");
    fill($("latest").tBodies[0], data.map(row));
  } catch (error) {
    notice($("requests-notice"), error.status === 403 ? "Requests are shown to admin keys." : error.message);
  }
}

function row(one) {
  const link = `#/requests/${encodeURIComponent(one.request_id)}`;
  return {
    key: one.id, link,
    cells: [
      h("a", "", one.request_id.slice(0, 13), { href: link, title: one.request_id }), new Date(1000 * one.time).toLocaleString("en-GB"),
      one.tenant, one.model, one.worker + (one.moves.length ? ` (moved ${one.moves.length}×)` : ""), pill(one.outcome, one.outcome === "ok" ? "good" : "bad"),
      number(`${round(one.prompt_tokens)} + ${round(one.output_tokens)}`), number(time(one.ttft_seconds)),
      number(time(one.tpot_seconds)), number(time(one.duration_seconds)),
    ],
  };
}

/** Null where it is not known. */
const known = path => json(path).catch(error => { if (error.status === 404) return null; throw error; });

export async function show(id) {
  $("request-id").value = id;
  try {
    const path = encodeURIComponent(id), { decisions = [] } = await known(`/api/v1/decisions/${path}`) ?? {};
    let row = await known(`/v1/admin/requests/${path}`);
    // A row is written soon after its request has ended.
    for (let tries = 0; !row && decisions.length && tries < 4; tries++) { await wait(200); row = await known(`/v1/admin/requests/${path}`); }
    notice($("requests-notice"), row || decisions.length ? row ? "" : "This request has not ended." : "Nothing is known of this request.");
    $("story").replaceChildren(...told(id, row, decisions));
    $("story").hidden = !row && !decisions.length;
  } catch (error) {
    $("story").hidden = true;
    notice($("requests-notice"), error.status === 403 ? "Requests are shown to admin keys." : error.message);
  }
}

function told(id, row, decisions) {
  const parts = [];
  if (row) parts.push(timeline(id, row, decisions));
  const causes = why(row, decisions);
  if (causes.length) parts.push(h("div", "panel", [h("h3", "", "Why it took that long"), h("ul", "", causes.map(one => h("li", "", one)))]));
  decisions.forEach((one, at) => parts.push(decision(one, at, decisions.length)));
  return parts;
}

function phases(row, decisions) {
  const all = row.duration_seconds ?? 0, queued = row.queue_seconds ?? 0, prefill = row.prefill_seconds ?? 0;
  const each = row.tpot_seconds ? `, one every ${time(row.tpot_seconds)}` : "", wrote = `${tokens(row.output_tokens)}${each}`;
  if (row.moves.length && row.ttft_seconds !== null) {
    // What is known of queue and prefill is that of the last worker, which came in between.
    return [["Until the first token", row.ttft_seconds, `${tokens(row.prompt_tokens)} of the prompt`, 3],
      ["Decode, moving included", Math.max(0, all - row.ttft_seconds), wrote, 4]];
  }
  const router = Math.min(queued, seconds(decisions.at(-1)?.queue_duration)), first = row.ttft_seconds ?? null;
  const cached = row.cached_tokens ? `, ${round(row.cached_tokens)} of them cached` : "";
  const found = [["In the router's queue", router, "", 0], ["In the engine's queue", queued - router, "", 1],
    ["Prefill", prefill, `${tokens(row.prompt_tokens)} of the prompt${cached}`, 2]];
  if (first === null) return [...found, ["The rest", Math.max(0, all - queued - prefill), "", 3]];
  return [...found, ["Else, until the first token", Math.max(0, first - queued - prefill), "checks, transport, a decode step", 3],
    ["Decode", Math.max(0, all - first), wrote, 4]];
}

function timeline(id, row, decisions) {
  const parts = phases(row, decisions), sum = parts.reduce((total, part) => total + part[1], 0) || 1;
  const bar = h("div", "time", parts.map(([name, took, , color]) => {
    const piece = h("i", `p${color}`, "", { title: `${name}: ${time(took)}` });
    piece.style.flexGrow = took / sum;
    return piece;
  }), { role: "img", "aria-label": parts.map(([name, took]) => `${name} ${time(took)}`).join(", ") });
  for (const move of row.moves) {
    const mark = h("b", "", "", { title: `moved away from ${move.worker}: ${move.cause}` });
    mark.style.left = `${Math.min(100, 100 * move.at_seconds / sum)}%`;
    bar.append(mark);
  }
  const legend = parts.flatMap(([name, took, note, color]) =>
    [h("i", `p${color}`), h("span", "", name), h("span", "n", time(took)), h("span", "n quiet", `${Math.round(100 * took / sum)} %`), h("span", "", note)]);
  const line = `${row.endpoint} of ${row.tenant}, model ${row.model}, on ${row.worker || "no worker"}, ${new Date(1000 * row.time).toLocaleString("en-GB")}`;
  const cost = row.cost ? ` · cost ${round(row.cost, 6)}` : "";
  return h("div", "panel", [h("h3", "", [`${id} `, pill(row.outcome, row.outcome === "ok" ? "good" : "bad")]),
    h("div", "quiet", line), h("div", "quiet", `${time(row.duration_seconds)} in all · ${time(row.gpu_seconds)} of a GPU${cost}`), bar, h("div", "legend", legend)]);
}

/** The same as `tokenloom explain` says. */
function why(row, decisions) {
  const found = [], last = decisions.at(-1), all = row?.duration_seconds ?? 0, large = took => took >= .5 || took >= Math.max(.05, all / 4);
  const worker = last?.worker_id || row?.worker || "";
  const ended = { ok: "", client_left: "Its client left before the answer was complete.", lost: "Its gateway ended before the request did: what it took is not known." };
  const ending = row ? ended[row.outcome] ?? `It ended with the error ${row.outcome}.` : "";
  if (ending) found.push(ending);
  for (const move of row?.moves ?? []) {
    found.push(`It was moved away from ${move.worker} ${time(move.at_seconds)} after it began, with ${move.emitted_tokens} tokens written: ${move.cause}.`);
  }
  const router = seconds(last?.queue_duration), engine = (row?.queue_seconds ?? 0) - router;
  if (last && large(router)) found.push(`It waited ${time(router)} in the router, since no worker for ${last.model} had room.`);
  if (large(engine)) found.push(`It waited ${time(engine)} in the queue of ${worker}'s engine.`);
  if (row && large(row.prefill_seconds ?? 0)) {
    found.push(`Its prompt took ${time(row.prefill_seconds)}: ${row.prompt_tokens - row.cached_tokens} tokens had to be computed${row.cached_tokens ? `, ${row.cached_tokens} were cached` : ""}.`);
  }
  const pace = one => seconds(one.predicted_time_per_output_token_duration);
  const best = (last?.candidates ?? []).filter(one => !one.excluded_reason).sort((one, other) => pace(one) - pace(other))[0];
  if (row?.tpot_seconds && best && best.worker_id !== worker && row.tpot_seconds > 1.5 * pace(best)) {
    found.push(`${worker} wrote a token every ${time(row.tpot_seconds)}; ${best.worker_id} would have written one every ${time(pace(best))}.`);
  }
  const reasons = slow().get(worker) ?? [], out = (last?.candidates ?? []).filter(one => one.excluded_reason);
  if (reasons.length && out.length) {
    const names = out.slice(0, 4).map(one => `${one.worker_id} (${one.excluded_reason})`).join(", ");
    found.push(`The others were out of the question: ${names}${out.length > 4 ? ` and ${out.length - 4} more` : ""}.`);
  }
  for (const reason of reasons) found.push(`${worker} is slow at present: ${reason}.`);
  return found;
}

function decision(one, at, count) {
  const body = h("tbody"), names = ["Worker", "First token", "Each token", "Reckoned in all", "Cached", "Verdict"];
  const cost = candidate => seconds(candidate.cost_duration);
  const looked = [...one.candidates ?? []].sort((a, b) => !!a.excluded_reason - !!b.excluded_reason || cost(a) - cost(b));
  fill(body, looked.map(candidate => {
    const out = candidate.excluded_reason, chosen = candidate.worker_id === one.worker_id, late = seconds(candidate.predicted_delay_duration);
    const learnt = late ? `${time(late)} until the first token learnt: first tokens there came late` : "";
    const when = text => number(out ? "–" : time(seconds(text)));
    return {
      key: candidate.worker_id, className: chosen ? "chosen" : "",
      cells: [candidate.worker_id, when(candidate.predicted_time_to_first_token_duration), when(candidate.predicted_time_per_output_token_duration),
        when(candidate.cost_duration), number(out ? "–" : round(candidate.predicted_cached_token_count)), out ? `out: ${out}` : [chosen && "chosen", learnt].filter(Boolean).join("; ")],
    };
  }));
  const head = h("thead", "", h("tr", "", names.map((name, place) => h("th", place && place < 5 ? "n" : "", name, { scope: "col" }))));
  const rule = [one.rule && `rule ${one.rule}`, one.degraded && "a smaller model than was asked for"].filter(Boolean).join(", ");
  return h("div", "panel", [
    h("h3", "", `Decision${count > 1 ? ` ${at + 1} of ${count}` : ""}: ${one.worker_id || "nobody"}`),
    h("div", "", one.reason ?? ""), h("div", "quiet", `model ${one.model}, about ${round(one.prompt_token_count)} tokens of prompt, ${time(seconds(one.queue_duration))} in the queue${rule ? ` · ${rule}` : ""}`),
    h("div", "scroll", h("table", "", [head, body])),
  ]);
}
