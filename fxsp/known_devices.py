"""Devices, and what links their like, as data with their source.

Rates are peaks by the vendor's data sheet, dense (without sparsity), of a link what one device sends in one direction:
half of what vendors print.  Sustained rates are lower, all alike, so that proportions hold better than seconds.
Latencies, and the time to start a kernel, are on no data sheet: they are assumptions of a usual order of magnitude, and
what ``fxsp.calibrate`` measures should replace them.
"""

from __future__ import annotations

__all__ = ["DEVICES", "LAUNCH", "LINKS", "NETWORK"]

#: Name -> (title, seconds per message, bytes per second that a device sends, source).
LINKS: dict[str, tuple[str, float, float, str]] = {
    "nvlink3": ("NVLink", 10e-6, 300e9, "NVIDIA A100 data sheet: 600 GB/s in both directions together"),
    "nvlink4": ("NVLink", 10e-6, 450e9, "NVIDIA H100 and H200 data sheets: 900 GB/s in both directions together"),
    "nvlink5": ("NVLink", 10e-6, 900e9, "NVIDIA HGX B200 data sheet: 1.8 TB/s in both directions together"),
    "xgmi": ("Infinity Fabric", 10e-6, 448e9, "AMD MI300X data sheet: 7 links of 128 GB/s in both directions together"),
    "pcie4": ("PCIe", 15e-6, 32e9, "PCI Express 4.0, 16 lanes of 16 GT/s"),
    "pcie5": ("PCIe", 15e-6, 64e9, "PCI Express 5.0, 16 lanes of 32 GT/s"),
    "400g": ("400G", 20e-6, 50e9, "400 Gbit/s Ethernet or InfiniBand NDR, one adapter for each device"),
}

#: Name -> (title, operations per second in bf16, bytes of memory per second, link within a node, source).
DEVICES: dict[str, tuple[str, float, float, str, str]] = {
    "a100": ("A100 SXM", 312e12, 2.039e12, "nvlink3", "NVIDIA A100 80GB SXM data sheet"),
    "h100": ("H100 SXM", 989e12, 3.35e12, "nvlink4", "NVIDIA H100 SXM data sheet"),
    "h200": ("H200 SXM", 989e12, 4.8e12, "nvlink4", "NVIDIA H200 SXM data sheet"),
    "b200": ("B200 SXM", 2250e12, 8e12, "nvlink5", "NVIDIA HGX B200 data sheet, an eighth of a board"),
    "l20": ("L20", 119.5e12, 864e9, "pcie4", "NVIDIA L20 data sheet"),
    "mi300x": ("MI300X", 1307.4e12, 5.3e12, "xgmi", "AMD Instinct MI300X data sheet"),
}

#: Seconds to start a kernel, and what links the nodes.
LAUNCH, NETWORK = 2e-6, "400g"
