// The page of one latent that is a file by itself, or an output of a notebook.
"use strict";

addEventListener("DOMContentLoaded", () => {
  const page = site.latentPage(site.value("latent"));
  document.getElementById("main").replaceChildren(page);
  addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    if (/^[1-4]$/.test(event.key)) page.examples.choose(site.TABS[event.key - 1]);
    if (event.key === "e") page.examples.widenAll();
  });
});
