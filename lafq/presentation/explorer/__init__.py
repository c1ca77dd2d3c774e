"""00_explore: what one setting gives (`explore`), and its picture with sliders (`panel`)."""
