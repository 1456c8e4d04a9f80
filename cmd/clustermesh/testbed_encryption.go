package main

import (
	"strings"

	"causeway/identity"
	"causeway/testbed"
)

// encryptionFlag is the value of --encryption where it is one for all clusters.
type encryptionFlag identity.Encryption

func (f *encryptionFlag) Type() string { return "all|inter-cluster|off" }
func (f *encryptionFlag) String() string {
	if *f == "" {
		return string(identity.EncryptAll)
	}
	return string(*f)
}
func (f *encryptionFlag) Set(s string) error {
	mode, err := identity.ParseEncryption(s)
	*f = encryptionFlag(mode)
	return err
}

// encryptionsFlag is the value of --encryption where clusters may differ: MODE for all, CLUSTER=MODE for one.
type encryptionsFlag struct{ o *testbed.Options }

func (f encryptionsFlag) Type() string   { return "[CLUSTER=]all|inter-cluster|off" }
func (f encryptionsFlag) String() string { return string(identity.EncryptAll) }
func (f encryptionsFlag) Set(s string) error {
	for part := range strings.SplitSeq(s, ",") {
		cluster, text, one := strings.Cut(part, "=")
		if !one {
			text = part
		}
		mode, err := identity.ParseEncryption(text)
		if err != nil {
			return err
		}
		if !one {
			f.o.Encryption = mode
			continue
		}
		if f.o.EncryptionOf == nil {
			f.o.EncryptionOf = map[string]identity.Encryption{}
		}
		f.o.EncryptionOf[cluster] = mode
	}
	return nil
}

// underlayFlag is the value of --underlay.
type underlayFlag testbed.Underlay

func (f *underlayFlag) Type() string       { return "ipv4|ipv6" }
func (f *underlayFlag) String() string     { return string(*f) }
func (f *underlayFlag) Set(s string) error { *f = underlayFlag(s); return nil }
