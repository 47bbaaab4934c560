"use strict";
// Votes live in this page alone; the download names the systems behind A and B.
const key = JSON.parse(document.getElementById("key").textContent);
const votes = new Map();
function vote(number, choice) {
  votes.set(number, choice);
  const pair = document.getElementById(`pair-${number}`);
  pair.classList.add("voted");
  pair.querySelector(".mine").textContent = `your vote: ${choice}`;
  document.getElementById("count").textContent = `${votes.size} of ${key.pairs.length}`;
}
for (const button of document.querySelectorAll("button[data-pair]")) {
  button.addEventListener("click", () => vote(Number(button.dataset.pair), button.dataset.choice));
}
function rows() {
  return key.pairs.map((pair, number) => {
    const choice = votes.get(number) ?? null;
    const preferred = choice === "A" ? pair.a : choice === "B" ? pair.b : choice;
    return { item: pair.item, speaker: pair.speaker, a: pair.a, b: pair.b, vote: choice, preferred };
  });
}
document.getElementById("download").addEventListener("click", () => {
  const data = { listener: document.getElementById("listener").value, question: key.question, votes: rows() };
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([JSON.stringify(data, null, 1)], { type: "application/json" }));
  link.download = "votes.json";
  link.click();
  URL.revokeObjectURL(link.href);
});
