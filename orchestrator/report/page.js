const button = document.querySelector("#motion");
if (button) {
  const root = document.documentElement;
  let moves = !matchMedia("(prefers-reduced-motion: reduce)").matches;
  const show = () => {
    root.classList.toggle("playing", moves);
    root.classList.toggle("paused", !moves);
    button.textContent = moves ? "Pause the clips" : "Play the clips";
  };
  button.addEventListener("click", () => { moves = !moves; show(); });
  button.hidden = false;
  show();
}
