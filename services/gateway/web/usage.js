// What was used and what it cost, by tenant.
import { $, fill, h, meter, notice, number, round, time } from "./page.js";
import { json } from "./api.js";

export function wire() {
  $("month").value = new Date().toISOString().slice(0, 7);
  $("usage-of").addEventListener("submit", event => { event.preventDefault(); show(); });
}

export async function show() {
  const month = $("month").value, query = month ? `?month=${encodeURIComponent(month)}` : "";
  try {
    const { data } = await json(`/v1/admin/usage${query}`);
    notice($("usage-notice"), data.length ? "" : "Nothing was used then.");
    shares(data);
    fill($("report").tBodies[0], data.map(row));
  } catch (error) {
    notice($("usage-notice"), error.status === 403 ? "Usage is shown to admin keys." : error.message);
  }
}

const money = value => round(value, value < 1 ? 6 : 2);

function shares(lines) {
  const tenants = new Map();
  for (const one of lines) {
    const sum = tenants.get(one.tenant) ?? { requests: 0, tokens: 0, gpu: 0, cost: 0 };
    sum.requests += one.requests;
    sum.tokens += one.prompt_tokens + one.output_tokens;
    sum.gpu += one.gpu_seconds;
    sum.cost += one.cost;
    tenants.set(one.tenant, sum);
  }
  // Where nothing has a price the share is that of the GPUs' time.
  const all = [...tenants.values()], priced = all.some(one => one.cost), of = one => priced ? one.cost : one.gpu;
  const whole = priced ? "the cost" : "the GPUs' time";
  const total = all.reduce((sum, one) => sum + of(one), 0) || 1;
  $("by-tenants").replaceChildren(...[...tenants].sort((a, b) => of(b[1]) - of(a[1])).slice(0, 12).map(([tenant, sum]) => h("div", "", [
    h("strong", "", tenant), meter(of(sum) / total, `${Math.round(100 * of(sum) / total)} % of ${whole}`, `share of ${whole}`, true),
    h("div", "quiet", `${round(sum.requests)} requests, ${round(sum.tokens)} tokens, ${time(sum.gpu)} of a GPU${priced ? `, cost ${money(sum.cost)}` : ""}`),
  ])));
}

function row(one) {
  return {
    key: `${one.month}\n${one.tenant}\n${one.model}`,
    cells: [one.month, one.tenant, one.model, ...[round(one.requests), round(one.prompt_tokens), round(one.cached_tokens),
      round(one.output_tokens), time(one.gpu_seconds), money(one.cost), money(one.cost_per_1000_tokens), money(one.cache_saved_cost)].map(number)],
  };
}
