// What scrolls sideways in a box of its own can be reached by keyboard, too.
addEventListener("load", () => {
  for (const box of document.querySelectorAll(
    ".bd-article table, .bd-article .cell_output, .bd-article div.math"
  )) {
    if (box.scrollWidth > box.clientWidth) box.tabIndex = 0;
  }
});
