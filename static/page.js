// What makes the page pleasant beside reading: writing, people, inviting. From chat.js it has $, chat,
// text, me, stored, store, is, state, send, tell and leave, from read.js all, arrivals, element and hidden.
"use strict";

// A double click is one click: the second would hit what lies below a dialog that the first has closed.
addEventListener("click", (event) => {
  if (event.detail > 1) event.preventDefault();
  if (event.detail > 1) event.stopImmediatePropagation();
}, { capture: true });

// ── Writing ──

const TYPING_TELLS = 3000, TYPING_LASTS = 6000; // milliseconds; an end needs no frame, and cannot get lost
let told = 0;

text.value = stored.draft || "";
text.addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return; // composing: 你好, not a send
  if (event.keyCode === 229 || !KEYBOARD) return; // 229: how Safari says the same
  event.preventDefault();
  $("composer").requestSubmit();
});
text.addEventListener("input", () => {
  store({ draft: text.value });
  const length = [...text.value.normalize("NFC")].length, most = Number(text.dataset.most);
  text.setCustomValidity(length > most ? `${length - most} characters too many. Please send it in parts.` : "");
  $("counter").textContent = length > 0.9 * most ? `${length} of ${most} characters` : "";
  if (!CSS.supports("field-sizing", "content")) {
    const { style, offsetHeight } = $("composer");
    style.minHeight = `${offsetHeight}px`; // or the log would move while the box is measured
    text.style.height = "auto";
    text.style.height = `${text.scrollHeight}px`;
    style.minHeight = "";
  }
  if (!text.value || !is("connected") || Date.now() - told < TYPING_TELLS) return;
  told = Date.now();
  send({ typing: true });
});
$("composer").addEventListener("submit", () => {
  told = 0;
  toEnd();
});

// Say why there is no echo: either nothing comes from the server, or it is kept busy by us.
let patience;
new MutationObserver(() => {
  clearTimeout(patience);
  if (is("connected")) state("connected"); // what was late has come
  if (unsent.length) patience = setTimeout(late, 5000, heard);
}).observe($("unsent"), { childList: true });

function late(before) {
  if (!is("connected")) return;
  const busy = "There were many messages from you, so they are being read more slowly.";
  state("connected", heard > before ? busy : "Waiting for the network…");
}

$("send").addEventListener("mousedown", (event) => event.preventDefault()); // or the keyboard would close
new MutationObserver((records) => {
  for (const node of arrivals(records)) {
    const member = node.dataset.typing;
    for (const old of all(`[data-typing="${member}"]`))
      if (old !== node || member === me?.member || hidden.has(member)) old.remove();
    setTimeout(() => node.remove(), TYPING_LASTS);
  }
}).observe($("typing"), { childList: true });

// ── People ──

function ask(question, answers) {
  $("question").textContent = question;
  const buttons = Object.entries({ ...answers, Cancel: null }).map(([label, act]) => {
    const button = element("button", label, { type: "button" });
    button.onclick = () => {
      $("ask").close(); // first: it puts the focus back
      act?.();
    };
    return button;
  });
  $("answers").replaceChildren(...buttons);
  const asked = document.activeElement;
  $("ask").onclose = () => asked.isConnected || $("presence").querySelector("summary").focus();
  $("ask").showModal();
}

// You first, the others by name. Each of them can be hidden by anybody, and removed by the host.
const people = new MutationObserver(() => {
  const host = $("people").querySelector("[data-host]")?.dataset.member === me?.member;
  const key = (li) => (li.dataset.member === me?.member ? "" : li.textContent.toLowerCase());
  const items = [...$("people").children].sort((a, b) => key(a).localeCompare(key(b)));
  for (const li of items) {
    const mine = li.dataset.member === me?.member;
    const marks = [mine && "you", "host" in li.dataset && "host"];
    if (marks.some(Boolean)) li.append(element("span", ` (${marks.filter(Boolean).join(", ")})`));
    if (!mine) li.append(menu(li, host));
    li.classList.toggle("unseen", hidden.has(li.dataset.member));
  }
  $("people").replaceChildren(...items);
  $("lock").hidden = !host;
  $("locked").hidden = !$("count").querySelector("[data-locked]");
  $("lock").setAttribute("aria-pressed", !$("locked").hidden);
  if (focused) $("people").querySelector(`[data-member="${focused}"] button`)?.focus();
  invite();
  people.takeRecords(); // of what we have done here
});
people.observe($("people"), { childList: true });

let focused; // the member whose button has the focus; it goes with each new list
chat.addEventListener("htmx:before:swap", () => {
  focused = document.activeElement.closest("#people li")?.dataset.member;
});

function menu(li, host) {
  const { member } = li.dataset, name = li.querySelector(".who").textContent;
  const button = element("button", "⋯", { type: "button" });
  button.setAttribute("aria-label", `${name}: hide${host ? " or remove" : ""}`);
  button.onclick = () => {
    const answers = { [hidden.has(member) ? "Show their messages" : "Hide their messages, for me"]: () => hide(member) };
    if (host) answers["Remove from the room"] = () => send({ remove: member });
    ask(name, answers);
  };
  return button;
}

function hide(member) {
  if (!hidden.delete(member)) hidden.add(member);
  store({ hidden: [...hidden] });
  for (const li of all(`[data-from="${member}"]`)) li.hidden = hidden.has(member);
  for (const li of all(`[data-member="${member}"]`)) li.classList.toggle("unseen", hidden.has(member));
  tell(hidden.has(member) ? "You do not see their messages any more." : "You see their messages again.");
}

$("lock").addEventListener("click", () => send({ lock: !pressed($("lock")) }));
$("leave").addEventListener(
  "click",
  (event) => {
    if ($("people").children.length !== 1) return;
    event.stopImmediatePropagation(); // chat.js would leave at once
    ask("You are the last one here: if you leave, the room closes, and what was said is gone.", { Leave: leave });
  },
  { capture: true },
);

// ── Inviting ──

// An empty room is an invitation.
function invite() {
  $("empty").hidden = $("people").children.length !== 1 || log.querySelector(".message") !== null;
}

async function copy() {
  try {
    await navigator.clipboard.writeText($("link").textContent);
  } catch {
    // Without https there is no clipboard, but the old way of copying what is selected.
    if (!$("invite").open) $("invite").showModal();
    getSelection().selectAllChildren($("link"));
    if (!document.execCommand("copy")) return ($("copied").textContent = "Copy the link that is marked.");
  }
  $("copied").textContent = "The link is copied.";
  tell("The link is copied.");
}
for (const button of all(".copy")) button.addEventListener("click", copy);
$("open-invite").addEventListener("click", () => $("invite").showModal());
$("close-invite").addEventListener("click", () => $("invite").close());
$("invite").addEventListener("close", () => ($("copied").textContent = ""));
$("share").hidden = !navigator.share;
$("share").addEventListener("click", () => navigator.share({ title, url: $("link").textContent }).catch(() => {}));

// The wire view is for those who ask for it, and so is its script.
$("wire-open").onclick = function load({ currentTarget: button }) {
  const { src } = button.dataset;
  const script = element("script", "", { src });
  script.onerror = () => (button.onclick = load); // to be asked for again
  button.onclick = null;
  document.head.append(script);
};

$("presence").open = innerWidth > 700;
text.dispatchEvent(new Event("input")); // the draft
