// Runs before the first paint: a page that is to be dark never flashes white. Not a module, since modules wait.
{
  let theme = null;
  try {
    theme = localStorage.getItem("baleen.theme");
  } catch {
    // blocked
  }
  if (theme === "light" || theme === "dark") document.documentElement.dataset.theme = theme;
}
