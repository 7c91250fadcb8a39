// Every page: loaded anew when `secateur leaderboard serve` has built the pages anew.
"use strict";

// Only the pages that it serves have a stamp, that of their build; at /built it tells that of the last one.
const stamp = document.querySelector("meta[name=stamp]");
if (stamp) {
  const last = () => fetch("/built").then((answer) => (answer.ok ? answer.text() : stamp.content));
  setInterval(async () => { if (await last().catch(() => stamp.content) !== stamp.content) location.reload(); }, 3000);
}
