// What scrolls sideways in a box of its own can be reached by keyboard, too.
addEventListener("load", () => {
  for (const box of document.querySelectorAll(
    ".bd-article table, .bd-article .cell_output, .bd-article div.math"
  )) {
    if (box.scrollWidth > box.clientWidth) box.tabIndex = 0;
  }
});
// An appendix at a chapter's end is folded; a link into it opens it.
addEventListener("DOMContentLoaded", () => {
  for (const section of document.querySelectorAll(".bd-article section[id^='appendix']")) {
    const [heading, ...rest] = section.children;
    const fold = document.createElement("details"), summary = document.createElement("summary");
    summary.textContent = "Show the appendix";
    fold.append(summary, ...rest);
    heading.after(fold);
    const open = () => {
      const aim = location.hash && document.getElementById(decodeURIComponent(location.hash.slice(1)));
      if (aim && (aim === section || fold.contains(aim))) { fold.open = true; aim.scrollIntoView(); }
    };
    addEventListener("hashchange", open);
    addEventListener("beforeprint", () => { fold.open = true; });
    open();
  }
});
// The theme names every fold "Toggle hidden content"; its own words say more.
addEventListener("DOMContentLoaded", () => {
  for (const summary of document.querySelectorAll(".bd-article summary[aria-label]"))
    summary.removeAttribute("aria-label");
});
