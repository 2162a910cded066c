"""Mobile artifacts, and the gate that lets only faithful ones out."""
