"""The machine behind sweeps: request, schedule, unpatched runs, routes, walks through blocks."""
