// The page that raters sit at. What a rater says is kept in this browser until the server has said that it is on disk.
"use strict";

const TAGS = new Set(["P", "BR", "HR", "PRE", "CODE", "EM", "STRONG", "S", "UL", "OL", "LI", "BLOCKQUOTE", "TABLE",
  "THEAD", "TBODY", "TR", "TD", "TH", "H1", "H2", "H3", "H4", "H5", "H6"]);
const MENDED = "mended: sent with your verdict";
const LOOK_MS = 3000, MOST_WAIT_MS = 10000;
const VERDICTS = { pairs: [["left", "A is better", "1"], ["right", "B is better", "2"], ["tie", "Tie", "3"],
  ["bad", "Both bad", "4"]], ratings: [] };
const OTHERS = [["undo", "Undo", "u"], ["skip", "Skip", "s"], ["edit", "Edit", "e"], ["flag", "Flag", "f"]];
const ARROWS = { ArrowLeft: "left", ArrowRight: "right", ArrowUp: "tie", ArrowDown: "bad" };

const byId = (id) => document.getElementById(id);
const token = location.hash.slice(1);
const place = "flowrl judgment ";  // begins the names of what waits
let rater = localStorage.getItem("flowrl rater") || "";
let shown = null, ratings = [], edits = {}, current = 0, since = 0, isBusy = false, looking = 0, numKept = 0;
const past = [];

function made(tag, kind, text) {
  const node = document.createElement(tag);
  if (kind) node.className = kind;
  if (text !== undefined) node.textContent = text;
  return node;
}

// Take over the few tags of Markdown, without attributes; of all others the text.
function copied(from, into) {
  for (const node of from.childNodes) {
    if (node.nodeType === Node.TEXT_NODE) into.append(node.data);
    else if (node.nodeType === Node.ELEMENT_NODE && TAGS.has(node.tagName)) {
      into.append(copied(node, document.createElement(node.tagName)));
    } else if (node.nodeType === Node.ELEMENT_NODE) into.append(node.textContent);
  }
  return into;
}

function rendered(html) {
  return copied(new DOMParser().parseFromString(html, "text/html").body, made("div", "text"));
}

// What waits has an entry each, so that two tabs neither lose nor overwrite anything of one another's.
function outbox() {
  return Object.keys(localStorage).filter((name) => name.startsWith(place)).sort();
}

function keep(judgment) {
  const when = String(Date.now()).padStart(15, "0") + String(numKept++).padStart(6, "0");
  localStorage.setItem(`${place}${when} ${judgment.key}`, JSON.stringify(judgment));
}

async function call(path, body) {
  const headers = { "Content-Type": "application/json", "Authorization": `Bearer ${token}` };
  const response = await fetch(path, { method: "POST", headers, body: JSON.stringify(body) });
  const answer = await response.json();
  if (!response.ok) throw Object.assign(new Error(answer.error), { status: response.status });
  return answer;
}

function trouble(text) {
  byId("trouble").hidden = !text;
  byId("trouble").textContent = text;
}

// Send what waits, oldest first; keeps trying, for nothing a rater said may be lost. What is about another run, which
// this address served before, goes on waiting for it.
async function send() {
  const strange = new Set(), first = () => outbox().find((each) => !strange.has(each));
  for (let wait = 500, name = first(); name; name = first(), wait = Math.min(2 * wait, MOST_WAIT_MS)) {
    const judgment = JSON.parse(localStorage.getItem(name));
    if (!judgment) continue;  // another tab has sent it meanwhile
    try {
      const answer = await call("/api/judge", judgment);
      localStorage.removeItem(name);
      trouble("");
      told(judgment, answer);
      wait = 250;
    } catch (error) {
      if (error.status === 404) strange.add(name);
      else if (error.status === 400) {
        localStorage.removeItem(name);
        trouble(`not taken: ${error.message}`);
      } else {
        lost(error);
        await new Promise((resolve) => setTimeout(resolve, wait));
      }
    }
  }
}

function lost(error) {
  const count = outbox().length;
  const kept = count ? ` ${count} judgment${count > 1 ? "s are" : " is"} kept in this browser and sent again.` : "";
  trouble((error.status ? `${error.message}.` : "No connection to flowrl feedback.") + kept);
}

function told(judgment, answer) {
  progress(answer.progress);
  const what = judgment.verdict === "undone" ? "taken back" : "saved";
  const late = answer.counts || judgment.verdict === "skip" ? "" : " for the record; training had gone on, or is over";
  byId("saved").textContent = `${what}${late}`;
}

function progress(found) {
  const parts = [`${found.judged} of ${found.asked} judged, ${found.mine} by you`];
  if (found.waiting) parts.push(`${found.waiting} waiting`);
  if (found.several) {
    const alpha = found.agreement === null ? "not known yet" : `${found.agreement.toFixed(2)} (Krippendorff's alpha)`;
    parts.push(`agreement of ${found.raters} raters ${alpha}, judged by several: ${found.several}`);
  }
  byId("progress").textContent = parts.join(" · ");
  byId("bar").firstElementChild.style.setProperty("width", `${found.asked ? 100 * found.judged / found.asked : 0}%`);
}

// Show the next question, or a certain one again.
async function next(question) {
  clearTimeout(looking);
  busy(true);
  try {
    await send();
    const answer = await call("/api/next", { rater, question: question || "" });
    trouble("");
    byId("run").textContent = answer.run;
    document.title = `${answer.run}: feedback`;
    progress(answer.progress);
    show(answer.question);
    busy(false);
  } catch (error) {  // what is shown is judged already: no key counts until something else is
    lost(error);
    looking = setTimeout(() => next(question), LOOK_MS);
  }
}

function busy(whether) {
  isBusy = whether;
  document.querySelector("main").setAttribute("aria-busy", String(whether));
}

function show(question) {
  shown = question;
  [ratings, edits, current, since] = [[], {}, 0, performance.now()];
  byId("empty").hidden = question !== null;
  for (const id of ["question", "keys"]) byId(id).hidden = question === null;
  byId("flagging").hidden = true;
  if (question === null) {
    looking = setTimeout(() => next(), LOOK_MS);
    return;
  }
  const about = [`group ${question.group}`, `policy version ${question.version}`];
  if (question.why) about.push(question.why);
  if (question.way === "ratings") about.push("keys 1 to 5 rate the framed answer");
  byId("about").textContent = about.join(" · ");
  byId("prompt").replaceChildren(...question.prompt.flatMap((message) =>
    [...(message.role ? [made("p", "role", message.role)] : []), rendered(message.html)]));
  const isPair = question.answers.length === 2;
  byId("answers").className = isPair ? "two" : "";
  byId("answers").replaceChildren(...question.answers.map(answerOf));
  byId("keys").className = question.way;
  byId("keys").replaceChildren(...VERDICTS[question.way].map(([name, text, key]) => button(name, text, key)),
    ...OTHERS.map(([name, text, key]) => button(name, text, key)));
  mark();
  window.scrollTo(0, 0);
}

function answerOf(answer, number) {
  const card = made("div", "answer");
  const head = made("header");
  head.append(made("b", "", String.fromCharCode(65 + number)), made("span", "edited"));
  const stars = made("div", "stars");
  if (shown.way === "ratings") {
    for (let star = 1; star <= 5; star++) {
      const each = made("button", "", String(star));
      each.setAttribute("aria-label", `${star} of 5 for ${String.fromCharCode(65 + number)}`);
      each.addEventListener("click", () => rate(number, star));
      stars.append(each);
    }
  }
  head.append(stars);
  card.append(head, rendered(answer.html));
  return card;
}

function button(name, text, key) {
  const isMain = ["left", "right"].includes(name);
  const each = made("button", isMain ? "main" : "", text);
  each.id = name;
  each.append(made("kbd", "", key));
  each.addEventListener("click", () => act(name));
  return each;
}

function mark() {
  [...byId("answers").children].forEach((card, number) => {
    card.classList.toggle("current", shown.way === "ratings" && number === current);
    [...card.querySelectorAll(".stars button")].forEach((star, k) => star.classList.toggle("on", ratings[number] === k + 1));
  });
  const undo = byId("undo");
  if (undo) undo.disabled = !past.length;
}

function rate(number, stars) {
  if (isBusy) return;
  ratings[number] = stars;
  const left = shown.answers.findIndex((_, k) => !ratings[k]);
  if (left < 0) return say("rated");
  current = left;
  mark();
  byId("answers").children[current].scrollIntoView({ block: "nearest" });
}

function say(verdict, flag) {
  const judgment = { key: crypto.randomUUID ? crypto.randomUUID() : unique(), question: shown.id, rater, verdict,
    ratings: verdict === "rated" ? ratings : [], edits: verdict === "undone" ? {} : edits, flag: flag || "",
    took_s: (performance.now() - since) / 1000 };
  keep(judgment);
  if (verdict !== "undone") past.push(shown.id);
  next();
}

function unique() {  // where the page has no secure context: a phone that reaches it without TLS
  return Array.from(crypto.getRandomValues(new Uint8Array(16)), (each) => each.toString(16).padStart(2, "0")).join("");
}

function undo() {
  const question = past.pop();
  if (!question) return;
  const judgment = { key: unique(), question, rater, verdict: "undone", took_s: 0 };
  keep(judgment);
  next(question);
}

// Open the answers for mending; once more, and they are shown as mended.
function edit() {
  const cards = [...byId("answers").children];
  const isOpen = cards.some((card) => card.querySelector("textarea"));
  cards.forEach((card, number) => card.querySelector(".text, textarea").replaceWith(
    !isOpen ? fieldOf(card, number) : number in edits ? made("div", "text mended", edits[number])
      : rendered(shown.answers[number].html)));
  if (!isOpen) cards[0].querySelector("textarea").focus();
}

function fieldOf(card, number) {
  const area = made("textarea");
  area.value = edits[number] ?? shown.answers[number].text;
  area.setSelectionRange(0, 0);
  area.setAttribute("aria-label", `what ${String.fromCharCode(65 + number)} should have been`);
  card.querySelector(".edited").textContent = number in edits ? MENDED : "Esc, then judge";
  area.addEventListener("input", () => {
    if (area.value === shown.answers[number].text) delete edits[number];
    else edits[number] = area.value;
    card.querySelector(".edited").textContent = number in edits ? MENDED : "";
  });
  return area;
}

function act(name) {
  if (isBusy || !shown) return;
  if (name === "undo") undo();
  else if (name === "edit") edit();
  else if (name === "flag") {
    byId("flagging").hidden = false;
    byId("reason").value = "";
    byId("reason").focus();
  } else say(name);
}

document.addEventListener("keydown", (event) => {
  const isTyping = ["INPUT", "TEXTAREA"].includes(event.target.tagName);
  if (event.key === "Escape" && isTyping) {
    event.target.blur();
    byId("flagging").hidden = true;
  }
  if (isTyping || event.ctrlKey || event.metaKey || event.altKey || !rater) return;
  const other = OTHERS.find(([, , key]) => key === event.key.toLowerCase());
  if (event.key.toLowerCase() === "u" && !shown && !isBusy) undo();
  if (!shown) return;
  const verdict = VERDICTS[shown.way].find(([, , key]) => key === event.key);
  const arrow = shown.way === "pairs" && ARROWS[event.key];
  if (shown.way === "ratings" && /^[1-5]$/.test(event.key)) rate(current, Number(event.key));
  else if (verdict || arrow) act(verdict ? verdict[0] : arrow);
  else if (other) act(other[0]);
  else return;
  event.preventDefault();
});

byId("flagging").addEventListener("submit", (event) => {
  event.preventDefault();
  if (!isBusy && shown) say("skip", byId("reason").value.trim());
});
byId("unflag").addEventListener("click", () => { byId("flagging").hidden = true; });
byId("who").addEventListener("click", () => sign());
byId("sign").addEventListener("submit", (event) => {
  event.preventDefault();
  rater = byId("name").value.trim();
  if (!rater) return;
  localStorage.setItem("flowrl rater", rater);
  begin();
});

function sign() {
  clearTimeout(looking);
  shown = null;
  for (const id of ["question", "keys", "empty"]) byId(id).hidden = true;
  byId("sign").hidden = false;
  byId("name").value = rater;
  byId("name").focus();
}

function begin() {
  byId("sign").hidden = true;
  byId("who").textContent = rater;
  next();
}

window.addEventListener("hashchange", () => location.reload());  // another token
if (!token) trouble("This address lacks its token: open the one that flowrl feedback says, with what stands behind #.");
else if (rater) begin();
else sign();
