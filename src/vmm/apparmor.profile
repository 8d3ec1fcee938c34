# AppArmor profile for QEMU as Bulkhead starts it. Load it with
#
#   bulkhead doctor --apparmor-profile | apparmor_parser --replace
#
# (or keep it in /etc/apparmor.d); from then on every QEMU is started in it, and
# does not start where that cannot be. Paths are those of the jail, where
# everything is read-only but the share; disks and devices are descriptors that
# were opened outside, under the paths they have there.

abi <abi/3.0>,

profile bulkhead-qemu flags=(attach_disconnected,mediate_deleted) {
  # QEMU, its libraries, modules and firmware, and what the guest boots.
  / r,
  /qemu mr,
  /lib{,32,64}/{,**} mr,
  /usr/lib{,32,64}/{,**} mr,
  /modules/{,**} mr,
  /firmware/{,**} r,
  /kernel r,
  /initramfs r,

  # Descriptors: disks of images, of machines and of templates, and devices.
  /**/images/** r,
  /**/runs/** rwk,
  /**/templates/** rwk,
  /dev/null rw,
  /dev/kvm rw,
  /dev/net/tun rw,
  /dev/vhost-vsock rw,
  /dev/vhost-net rw,

  # The shared workspace, and how virtio-9p reaches attributes of its files.
  /share/{,**} rwkl,
  /proc/ r,
  /proc/[0-9]*/{,fd/,task/{,**}} r,

  # Sockets it was given. It makes none and connects to nothing.
  network unix stream,
  unix (send, receive, accept, listen, getattr, setattr, getopt, setopt, shutdown) type=stream,

  # Its supervisor ends it and looks at it; its threads wake each other up.
  signal (receive) peer=unconfined,
  signal (send, receive) peer=bulkhead-qemu,
  ptrace (readby) peer=unconfined,
}
