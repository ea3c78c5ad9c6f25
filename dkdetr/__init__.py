"""DK-DETR: open-vocabulary detection by distilling visual-linguistic knowledge into DETR."""
