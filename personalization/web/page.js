// What the page does in the browser by itself: copies, slides, and says in the tab's title how far a run is.

async function copyText(button) {
  const text = button.dataset.copy;
  try {
    await navigator.clipboard.writeText(text);
  } catch {  // a page that came without HTTPS over a network
    const area = Object.assign(document.createElement("textarea"), { value: text });
    document.body.append(area);
    area.select();
    document.execCommand("copy");
    area.remove();
  }
  const said = button.textContent;
  button.textContent = "Copied";
  setTimeout(() => { button.textContent = said; }, 1500);
}

document.addEventListener("click", (event) => {
  const button = event.target.closest?.("[data-copy]");
  if (button) copyText(button);
});

document.addEventListener("input", (event) => {
  const slider = event.target.closest?.(".slider");
  if (slider) slider.style.setProperty("--at", `${event.target.value}%`);
});

const pageTitle = document.title;
setInterval(() => {
  const title = document.querySelector("#status [data-title]")?.dataset.title;
  const wanted = title || pageTitle;
  if (document.title !== wanted) document.title = wanted;
}, 1000);
