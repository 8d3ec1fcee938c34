# Makes this machine's root file system the lab's: run in the fresh lab as root,
# with the share of / mounted on $1, the kit's directory in it as $2, and the
# kernel's release as $3.
set -e
share=$1 kit=$2 release=$3
mkdir -p /run/lab
cp "$share$kit/busybox" /run/lab/busybox
bb=/run/lab/busybox
# Once more, with a cache: nobody changes anything while the lab runs, and if
# somebody does, the lab may as well not see it.
$bb umount "$share"
$bb mount -t tmpfs -o size=80%,mode=755 lab /mnt
cd /mnt
mkdir host upper work root
$bb mount -t 9p -o ro,trans=virtio,version=9p2000.L,msize=512000,cache=loose workspace host
$bb mount -t overlay -o lowerdir=host,upperdir=upper,workdir=work lab root
mkdir -p "root/lib/modules/$release" root/run root/.old
$bb mount --bind "host$kit/lib/modules/$release" "root/lib/modules/$release"
for dir in dev proc sys; do $bb mount --rbind "/$dir" "root/$dir"; done
$bb mount -t tmpfs -o mode=755 run root/run
mkdir -m 1777 root/run/lock
mkdir root/run/lab
cp $bb root/run/lab/busybox
ln -s busybox root/run/lab/modprobe
cd root
$bb pivot_root . .old
cd /
bb=/run/lab/busybox
$bb umount -l /.old
rmdir /.old
# What the kernel wants it loads by itself: all of nftables, for one.
echo /run/lab/modprobe > /proc/sys/kernel/modprobe
for module in kvm_amd vhost_vsock vhost_net tun; do $bb modprobe $module; done
test -c /dev/kvm
