# SPDX-License-Identifier: GPL-2.0-or-later
"""Recipes and the builder for all that is booted: QEMU, kernel, lab host, probe guest."""
