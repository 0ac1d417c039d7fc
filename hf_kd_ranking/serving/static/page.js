"use strict";
// Texts are added by textContent only, so that markup in a query or a passage is shown and never run.

const $ = (id) => document.getElementById(id);
let about = { title: document.title, examples: [] };
let running = null; // the search that is running, which the next one aborts
let shown = null; // the query whose results are on the page

function make(tag, properties = {}, ...children) {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children);
  return element;
}

const milliseconds = (ms) => (ms < 10 ? ms.toFixed(1) : Math.round(ms).toLocaleString("en")) + " ms";

const key = { value: sessionStorage.getItem("key") };

async function ask(path, options = {}) {
  const headers = { "Content-Type": "application/json" };
  if (key.value) headers.Authorization = `Bearer ${key.value}`;
  const response = await fetch(path, { ...options, headers });
  const isJson = (response.headers.get("content-type") || "").includes("json");
  const answer = isJson ? await response.json() : { message: `The server failed (${response.status}); its log says why.` };
  if (response.status === 401 && (key.value = prompt("API key of this server"))) {
    sessionStorage.setItem("key", key.value);
    return ask(path, options);
  }
  if (!response.ok) throw new Error(answer.message);
  return answer;
}

// Returns the description of the page; shows what the server does until there is one.
async function waitUntilReady() {
  for (;;) {
    const description = await ask("about");
    $("progress").hidden = !description.progress;
    $("status").textContent = "";
    if (!description.progress) return description;
    const { stage, done, total } = description.progress;
    const share = total ? `, ${done.toLocaleString("en")} of ${total.toLocaleString("en")}` : "";
    $("status").textContent = `The server is starting: ${stage}${share} …`;
    if (total) Object.assign($("progress"), { max: total, value: done });
    else $("progress").removeAttribute("value");
    await new Promise((resolve) => setTimeout(resolve, 300));
  }
}

const SHADES = { BM25: 0, "query encoding": 1, "passage encoding": 2, "reading vectors": 2, scoring: 3, search: 3, words: 0 };
const sum = (stages) => stages.reduce((total, [, ms]) => total + ms, 0);

function timeBar(stages) {
  const bar = make("div", { className: "bar", ariaHidden: "true" });
  const list = make("ul", { className: "stages" });
  for (const [name, ms] of stages) {
    const part = make("span", { className: `s-${SHADES[name]}` });
    part.style.flexGrow = ms;
    bar.append(part);
    list.append(make("li", { className: `s-${SHADES[name]}` }, `${name} ${milliseconds(ms)}`));
  }
  return [bar, list];
}

function firstStageRank(hit, rank, results) {
  if (results.candidates === null) return [];
  if (hit.first_rank === null) return [make("span", {}, `not in BM25’s ${results.candidates}`)];
  const rise = hit.first_rank - rank;
  const arrow = rise > 0 ? ` ↑${rise}` : rise < 0 ? ` ↓${-rise}` : "";
  return [make("span", { className: rise > 0 ? "rose" : "" }, `BM25 #${hit.first_rank}${arrow}`)];
}

// The heaviest words of a sparse vector; those that are not in the text are emphasised.
function termList(terms) {
  if (!terms) return [];
  const words = terms.map((term) =>
    make("span", {}, make(term.is_expansion ? "em" : "span", {}, term.word), ` ${term.weight.toFixed(2)}`));
  return [make("p", { className: "details terms", title: "Words of the vector; emphasised: not in the text" }, ...words)];
}

function hitItem(hit, rank, results) {
  const details = make("p", { className: "details" }, ...firstStageRank(hit, rank, results),
    make("span", {}, `score ${hit.score.toFixed(3)}`), make("span", {}, `id ${hit.doc_id}`));
  if (hit.passage_id !== hit.doc_id) details.append(make("span", {}, `passage ${hit.passage_id.split("#").pop()}`));
  const body = make("div", {}, make("p", { className: "passage folded" }, hit.text), details, ...termList(hit.terms));
  return make("li", {}, make("span", { className: "rank" }, rank), body);
}

// Long passages are folded; a button unfolds them where something is hidden.
function addFolds() {
  for (const text of document.querySelectorAll(".passage.folded")) {
    if (text.scrollHeight <= text.clientHeight + 2) continue;
    const button = make("button", { type: "button", className: "more", ariaExpanded: "false" }, "Show all");
    button.addEventListener("click", () => {
      const isFolded = text.classList.toggle("folded");
      button.textContent = isFolded ? "Show all" : "Show less";
      button.ariaExpanded = String(!isFolded);
    });
    text.after(button);
  }
}

function showResults(results) {
  const stages = Object.entries(results.stages_ms);
  const found = [make("h2", {}, about.name), make("p", {}, about.line), ...timeBar(stages), ...termList(results.terms)];
  if (!results.hits.length) found.push(make("p", { className: "none" }, "No passage contains a word of this query."));
  found.push(make("ol", { className: "hits" }, ...results.hits.map((hit, i) => hitItem(hit, i + 1, results))));
  $("results").replaceChildren(...found);
  addFolds();
  $("status").textContent = `Passages: ${results.hits.length}. ${milliseconds(sum(stages))} in total.`;
  $("intro").hidden = true;
}

async function search(query) {
  if (running) running.abort();
  const mine = (running = new AbortController());
  $("error").textContent = "";
  $("status").textContent = "Searching …";
  $("main").setAttribute("aria-busy", "true");
  try {
    const results = await ask("search", { method: "POST", body: JSON.stringify({ query }), signal: mine.signal });
    shown = query;
    showResults(results);
  } catch (error) {
    if (mine.signal.aborted) return;
    $("status").textContent = "";
    $("error").textContent = error.message;
    $("results").replaceChildren();
  }
  if (mine === running) $("main").removeAttribute("aria-busy");
}

function showIntro() {
  shown = null;
  if (running) running.abort();
  $("main").removeAttribute("aria-busy");
  $("results").replaceChildren();
  $("status").textContent = $("error").textContent = "";
  $("intro").hidden = false;
}

// The address contains the query, so that it can be shared and the browser's Back button works.
function followAddress() {
  const query = new URLSearchParams(location.search).get("q");
  document.title = query ? `${query} · ${about.title}` : about.title;
  if (query === shown && query !== null) return;
  $("query").value = query || "";
  if (query === null) showIntro();
  else search(query);
}

function go(event, query) {
  event.preventDefault();
  shown = null;
  history.pushState(null, "", "?q=" + encodeURIComponent(query));
  followAddress();
}

async function start() {
  try {
    about = await waitUntilReady();
  } catch (error) {
    $("error").textContent = error.message;
  }
  $("title").textContent = about.title;
  $("about").textContent = about.documents ? `${about.documents.toLocaleString("en")} passages, ranked by hf_kd_ranking` : "";
  if (about.name) $("ranker").replaceChildren(make("b", {}, about.name), about.line);
  $("examples").hidden = !about.examples.length;
  for (const example of about.examples) {
    const link = make("a", { href: "?q=" + encodeURIComponent(example) }, example);
    link.addEventListener("click", (event) => { if (!event.ctrlKey && !event.metaKey) go(event, example); });
    $("examples").lastElementChild.append(make("li", {}, link));
  }
  $("form").addEventListener("submit", (event) => go(event, $("query").value.trim()));
  addEventListener("popstate", followAddress);
  followAddress();
}

start();
